"""What `linearize inspect` draws: one self-contained HTML page, and graphs as DOT or SVG."""
