"""What users look at: comparison tables, `report.html`, `PERFORMANCE_REPORT.md` and the plots.

Everything here is a function of result files and a decision; nothing is measured, nothing needs
torch. SI base units come in, and are turned into ms, MiB and percent only here (`units`).
"""
