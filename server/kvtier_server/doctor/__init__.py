"""`kvtier doctor`: what on this machine would keep a daemon or its engines from working well.

One file a family of checks; each check looks at one thing and returns a `Finding`. Nothing here changes
anything that lasts, and what is missing, unreadable or hung is itself a finding, never an exception. The
kernel's files are read below `Machine.root`, so that a test can put others there.
"""
