"""``python -m manyicl``, and the script: the command line, which ends quietly also while its modules are loaded."""


def main() -> None:
    """Run a command; Ctrl-C ends with 130 from the first moment."""
    try:
        from manyicl.cli.main import main as run

        run()
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
