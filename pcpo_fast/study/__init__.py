"""`pcpo study`: algorithms x seeds x tasks in parallel processes, with tables and figures; see docs/study.md."""
