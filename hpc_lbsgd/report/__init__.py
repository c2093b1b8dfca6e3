"""What was measured, for people to look at: how figures are made.

May be imported by: bench, reproduce, plan, cluster, cli.
May import: records, theory, errors.
"""
