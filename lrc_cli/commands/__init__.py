"""Each command of `lrc` has a file here, with its options, its body and its text.

These files import click and the shared options at the top. A command imports everything else when
it runs: `lrc X --help` answers at once, and torch takes seconds.
"""
