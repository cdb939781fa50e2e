"""RUN/report.html: one page on a run that anybody can read, from a disk, without a network."""
