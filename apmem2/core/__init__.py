"""The core: from errors to maps, each file importing only from those named before it.

errors, granularity, config, runtime statistics, opening, source, registry, ranges, persist, pieces, folios, mapping,
making.
"""
