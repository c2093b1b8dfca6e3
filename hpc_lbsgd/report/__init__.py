"""What was measured, for people to look at: how figures are made, and how two runs compare.

May be imported by: bench, reproduce, plan, cluster, cli.
May import: yaml12, records, theory, errors.
"""
