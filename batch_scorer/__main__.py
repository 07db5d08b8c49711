"""`python -m batch_scorer`: the command line, where no script is installed."""

from batch_scorer.cli import main

if __name__ == "__main__":
    main()
