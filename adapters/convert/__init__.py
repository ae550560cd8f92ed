"""Offline conversions of what training leaves behind and a server never reads: pickles. One file per layout."""
