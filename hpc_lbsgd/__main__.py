"""hpc-lbsgd, and python -m hpc_lbsgd: Ctrl-C while the commands are loaded ends it, too, without a traceback."""

import signal


def main() -> None:
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if usual:  # not under nohup, nor in a shell's background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from hpc_lbsgd import cli

    if usual:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.run()


if __name__ == "__main__":
    main()
