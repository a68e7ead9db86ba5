"""Reports as single HTML files that load nothing: one page style, charts, coloured tokens, one palette."""
