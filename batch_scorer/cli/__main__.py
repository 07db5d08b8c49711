"""`python -m batch_scorer.cli`: how a job starts this program on a cluster."""

from batch_scorer.cli import main

if __name__ == "__main__":
    main()
