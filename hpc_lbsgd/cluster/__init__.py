"""Launchers, jobs, sites, and what a machine can do."""
