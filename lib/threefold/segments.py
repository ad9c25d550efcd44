"""What a position of a packed row belongs to, as one number: rows are laid out by it, attention and positions read it.

0 is a sink, which every later position sees. n >= 1 is the n-th document, which sees the sinks and its own past.
n + (m << TRUNK_SHIFT) is a branch: a document that continues the m-th one, its trunk, and sees that, too. For all
others m is 0, the sinks. -1 is padding, which nothing but padding sees.
"""

SINK, PADDING = 0, -1
TRUNK_SHIFT = 32
