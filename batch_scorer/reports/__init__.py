"""What people see of a run: progress while it goes, tables when it is done."""
