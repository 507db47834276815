"""A run, or several beside each other, to look at: its curves as a picture, and all that it recorded as one HTML page.

Reads run folders, and nothing else of a run.
"""
