"""Importing this has every docstring parsed once in a process, not in every command.

Parsers of commands take their help from the sources, four fifths of the time in which a command reads its options.
"""

import functools

import docstring_parser

docstring_parser.parse_from_object = functools.cache(docstring_parser.parse_from_object)
