"""Run by a test: several commands one after another in one process, which share one engine.

several.py JOBS.json FOLDER     [[words of a command], ...]; temporary files go to FOLDER. Prints a list of [exit
                                code, stdout, stderr]
"""

import io
import json
import os
import sys
import tempfile
from pathlib import Path


class Finishes:
    """A callback: the run is done after step 9. An audit is not to call it."""

    def on_step(self, record, view):
        assert "audit" not in view.folder.name
        if record["step"] == 9:
            view.finish()


def main(jobs, temporary):
    from hpc_lbsgd import cli
    from hpc_lbsgd.parallel import engine as engines

    tempfile.tempdir, here, real, made, close = temporary, os.getcwd(), (sys.stdout, sys.stderr), [], None
    create, said = engines.create, []

    def once(*words):
        nonlocal close
        if not made:
            made.append(create(*words))
            close, made[0].close = made[0].close, lambda: None
        return made[0]

    engines.create = once
    for words in json.loads(Path(jobs).read_text()):
        streams = sys.stdout, sys.stderr = [io.TextIOWrapper(io.BytesIO()) for _ in real]
        try:
            code = cli.main(words)
        except SystemExit as end:
            code = end.code
        finally:
            sys.stdout, sys.stderr = real
        os.chdir(here)
        for stream in streams:
            stream.flush()
        said.append([code, *(stream.buffer.getvalue().decode() for stream in streams)])
    print(json.dumps(said))
    close()


if __name__ == "__main__":
    main(*sys.argv[1:])
