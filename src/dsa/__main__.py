"""The `dsa` script, and `python -m dsa` for launchers of several processes such as `torchrun -m dsa train ...`."""

import sys


def run() -> None:
    """Runs the command; Ctrl-C while its libraries load is a stop, too."""
    try:
        from dsa.cli.main import run as command

        command()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    run()
