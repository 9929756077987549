"""The version, read by setup.cfg too."""

VERSION = "0.1.0"
