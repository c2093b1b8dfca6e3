"""Stand-in for LSF: bsub, bjobs, bkill, brequeue."""

from __future__ import annotations

import json
import re
import shlex
import signal
import sys

from jobs import HOST, Parser, Refused, change, home, options, read, submit


class LSF:
    ends_with = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
    flags = {"-r", "-ti"}
    time = r"(\d+:)?\d+"
    grammar = {
        "-J": r"[\w.-]+(\[\d+-\d+\])?",
        "-q": r"\w+",
        "-P": r"\w+",
        "-n": r"\d+",
        "-R": r"span\[ptile=\d+\]",
        "-gpu": r"num=\d+",
        "-W": time,
        "-wa": "USR1|USR2|URG|INT|TERM",
        "-wt": time,
        "-t": r"((((\d{4}:)?\d+:)?\d+:)?\d+:\d+)",
        "-o": r"\S.*",
        "-w": r"(done|ended)\(\d+\)( && (done|ended)\(\d+\))*",
    }

    def bsub(self, *words):
        text = sys.stdin.read()
        lines = [word for line in text.splitlines() if line.startswith("#BSUB ") for word in shlex.split(line[6:])]
        o = options([*lines, *words], self.grammar, self.flags)
        slots, ptile = int(o["-n"][0]), int(re.search(r"\d+", o["-R"][0])[0])
        if slots != ptile:
            raise Refused("this stand-in has one node")
        if "[" in o["-J"][0]:
            raise Refused("this stand-in runs no arrays")

        def seconds(value):
            hours, _, minutes = value.rpartition(":")
            return (int(hours or 0) * 60 + int(minutes)) * 60

        if ("-wa" in o) != ("-wt" in o):
            raise Refused("-wa must be specified together with -wt")
        warn = o["-wa"][0] if "-wt" in o else None
        before = re.findall(r"\((\d+)\)", o.get("-w", [""])[0])
        after = "afterok" if "done" in o.get("-w", [""])[0] else "afterany"
        facts = {"limit_s": seconds(o["-W"][0]), "ranks": slots, "name": o["-J"][0], "warn": warn, "after": after}
        number = submit(text, o["-o"][0].replace("%J", "@"), system="lsf", words=[], before=before, **facts)
        print(f"Job <{number}> is submitted to default queue <normal>.")

    def bjobs(self, *words):
        p = Parser()
        p.add_argument("-o", required=True)
        p.add_argument("-json", action="store_true")
        p.add_argument("-noheader", action="store_true")
        p.add_argument("job")
        a = p.parse_args(words)
        if a.json and a.noheader:
            raise Refused("-json conflicts with -noheader")
        try:
            job = read(a.job)
        except Refused:
            raise Refused(f"Job <{a.job}> is not found") from None
        stat = {"QUEUED": "PEND", "RUNNING": "RUN", "ENDING": "RUN"}.get(job["state"])
        fields = {"stat": stat or ("EXIT" if job["exit"] else "DONE"), "time_left": "0:8 L" if stat == "RUN" else "-"}
        asked = {name: fields[name] for name in a.o.split()}
        if a.json:
            print(json.dumps({"COMMAND": "bjobs", "JOBS": 1, "RECORDS": [{k.upper(): v for k, v in asked.items()}]}))
        else:
            print(*asked.values())

    def bkill(self, *numbers):
        for number in numbers:
            change(number, asked="cancel")

    def brequeue(self, *numbers):
        for number in numbers:
            if read(number)["state"] != "RUNNING":
                raise Refused(f"Job <{number}> is being dispatched or exited")
            change(number, asked="requeue")
            print(f"Job <{number}> is being requeued")

    def begins_in(self, job):
        return job["cwd"]

    def environment(self, job):
        file = home() / "jobs" / f"{job['number']}.hosts"
        file.write_text(f"{HOST}\n" * job["ranks"])
        own = {"LSB_JOBID": job["number"], "LSB_JOBINDEX": "0", "LSB_DJOB_HOSTFILE": str(file),
               "LSB_MCPU_HOSTS": f"{HOST} {job['ranks']}", "LS_SUBCWD": job["cwd"]}  # fmt: skip
        return job["environment"] | own
