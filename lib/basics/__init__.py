"""What both packages need: errors in one line, atomic files and hashes, child processes."""
