"""``python -m manyicl``: the command line without its script, as ``torchrun -m manyicl train …`` needs it."""

from manyicl.cli.main import main

if __name__ == "__main__":
    main()
