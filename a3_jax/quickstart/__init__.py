"""The whole path in minutes: train a small AR model, export it, convert it, adapt it, fill blanks.

`config` holds the tiny run (which `configs/tiny.py` is, too), `run.quickstart` walks the path,
`questions` fills the blanks and counts, `report` draws and writes the page.
"""
