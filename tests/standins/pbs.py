"""Stand-in for PBS: qsub, qstat, qdel."""

from __future__ import annotations

import re
import shlex
import signal
import time
from pathlib import Path

from jobs import HOST, Refused, change, home, options, read, submit


class PBS:
    ends_with = (signal.SIGTERM, signal.SIGKILL)  # kill_delay apart
    flags = {"-V"}
    grammar = {
        "-N": r"[A-Za-z0-9][!-~]*",
        "-S": r"/\S+",
        "-q": r"[\w.@-]+",
        "-A": r"\S+",
        "-l": r"(select=\d+(:(ncpus|mpiprocs|ngpus|ompthreads|mem)=\w+)+|place=(free|pack|scatter|vscatter)(:\w+)?"
        r"|walltime=\d+:\d\d:\d\d)",
        "-j": "oe|eo|n",
        "-k": "[doe]+|n",
        "-r": "y|n",
        "-W": r"depend=(afterok|afterany)(:\d+\.standin)+",
        "-o": r"[^:]+",
    }

    def qsub(self, *words):
        if not words or words[-1].startswith("-"):
            raise Refused("usage: qsub [options] script; nothing follows the script")
        script = Path(words[-1])
        lines = []
        for line in script.read_text().splitlines():
            if line.startswith("#PBS "):
                lines += shlex.split(line[5:])
            elif line.strip() and not line.startswith("#"):
                break
        o = options([*lines, *words[:-1]], self.grammar, self.flags)
        select = dict(re.findall(r"(\w+)=(\w+)", next(v for v in o["-l"] if v.startswith("select"))))
        ranks = int(select["mpiprocs"])
        if int(select["select"]) > 1:
            raise Refused("this stand-in has one node")
        hours, minutes, seconds = map(int, next(v for v in o["-l"] if v.startswith("wall")).split("=")[1].split(":"))
        after, *before = o.get("-W", ["depend=afterany"])[-1].split("=")[1].split(":")
        for number in before:
            read(number.split(".")[0])
        if "-V" not in o or o.get("-k") != ["doe"] or o.get("-j") != ["oe"]:
            raise Refused("the tests read one log as it grows, and the job wants our environment")
        log = f"{o['-o'][0]}@.standin.OU" if "-o" in o else f"{o['-N'][0]}.o@"
        number = submit(script.read_text(), log, system="pbs", words=[], before=[n.split(".")[0] for n in before],
                        after=after, warn=None, limit_s=hours * 3600 + minutes * 60 + seconds, ranks=ranks,
                        name=o["-N"][0])  # fmt: skip
        print(f"{number}.standin")

    def qstat(self, *words):
        *options, number = words
        if not {"-f", "-x"} >= {w for w in options if w in ("-f", "-x")} or number[:1] == "-":
            raise Refused("usage: qstat -f [-x] [-F json] ID")
        try:
            job = read(number.removesuffix(".standin"))
        except Refused:
            raise Refused(f"qstat: Unknown Job Id {number}") from None
        state = {"QUEUED": "Q", "RUNNING": "R", "ENDING": "R", "ENDED": "F"}[job["state"]]
        if state == "F" and "-x" not in options:
            raise Refused(f"qstat: {number} Job has finished, use -x or -H to obtain historical job information")
        limit = time.strftime("%H:%M:%S", time.gmtime(job["limit_s"]))
        facts = {"job_state": state}
        if state == "R":
            used = time.strftime("%H:%M:%S", time.gmtime(time.time() - job["begun"]))
            facts["resources_used.walltime"] = used
        if state == "F":
            facts["Exit_status"] = job["exit"]
        facts |= {"Resource_List.walltime": limit, "Variable_List": "PBS_O_HOME=/root,A=1,\n\tB=2 = 3"}
        print(f"Job Id: {number}", *(f"    {key} = {value}" for key, value in facts.items()), sep="\n")

    def qdel(self, *numbers):
        for number in numbers:
            change(number.removesuffix(".standin"), asked="cancel")

    def begins_in(self, job):
        return home()  # not where it was submitted

    def environment(self, job):
        file = home() / "jobs" / f"{job['number']}.nodes"
        file.write_text(f"{HOST}\n" * job["ranks"])
        own = {"PBS_JOBID": f"{job['number']}.standin", "PBS_NODEFILE": str(file), "PBS_O_WORKDIR": job["cwd"],
               "PBS_ENVIRONMENT": "PBS_BATCH", "PBS_JOBNAME": job["name"]}  # fmt: skip
        return job["environment"] | own
