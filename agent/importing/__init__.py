"""`hostprobe import`: another agent's configuration as one of hostprobe's, and a list of what is lost.

    text ──source──▶ settings ──telegraf or collectd──▶ Draft ──▶ commented TOML

The tables of what becomes of an input, plugin or output are plain data in `telegraf`, `telegraf_outputs`,
`collectd` and `collectd_outputs`. Every key is tried with the loader before it is kept: what is
printed loads.
"""
