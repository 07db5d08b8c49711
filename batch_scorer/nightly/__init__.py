"""Score what is new, run by run, into generations."""
