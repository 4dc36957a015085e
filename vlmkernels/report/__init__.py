"""Self-contained HTML pages about training runs, and SVG charts that other pages use too."""
