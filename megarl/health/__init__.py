"""Watches over a run: health before work, hangs with a name, stops that save, one run in one folder."""
