"""Runs → one self-contained HTML page and PNGs: curves, scores by stage, artifact maps, differences, environment."""
