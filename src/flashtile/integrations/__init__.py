"""Foreign attention signatures on top of the native call: one file, one signature family."""
