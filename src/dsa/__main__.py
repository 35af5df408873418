"""`python -m dsa`, for launchers of several processes such as `torchrun -m dsa train ...`."""

from dsa.cli.main import run

if __name__ == "__main__":
    run()
