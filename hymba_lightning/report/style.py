"""The report's style sheet. Colours are variables, so that the drawings follow a dark page."""

from __future__ import annotations

from hymba_lightning.report.charts import COLORS

DARK_COLORS = ("#6ba3e0", "#e89a5f", "#5cc29c", "#b98bdb", "#e07a92", "#a3abb5")


def _palette(colors: tuple[str, ...]) -> str:
    return "".join(f"--c{index}:{color};" for index, color in enumerate(colors))


CSS = f"""
:root{{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--ink:#22262b;--muted:#68717c;--rule:#e2e5e8;
{_palette(COLORS)}}}
@media(prefers-color-scheme:dark){{:root{{--bg:#15181c;--card:#1d2126;--ink:#e4e7ea;--muted:#98a1ab;--rule:#333a42;
{_palette(DARK_COLORS)}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}}
main{{max-width:1180px;margin:0 auto;padding:28px 20px 60px}}
h1{{font-size:26px;margin:0 0 6px;font-weight:650;overflow-wrap:anywhere}}
h2{{font-size:18px;margin:34px 0 10px;font-weight:650}}
p{{margin:4px 0}}
.muted{{color:var(--muted);font-size:13px}}
.chip{{display:inline-flex;align-items:center;gap:6px;margin:0 14px 4px 0;font-size:14px}}
.chip i,.key i,.head i{{width:11px;height:11px;border-radius:3px}}
.key,.head{{display:inline-flex;align-items:center;gap:4px;margin-right:8px;font-size:13px}}
.head{{margin-right:0}}
.keys{{display:block;color:var(--muted)}}
.grid2{{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:16px}}
figure{{margin:0;padding:14px 14px 10px;background:var(--card);border:1px solid var(--rule);border-radius:8px;
min-width:0}}
figcaption{{margin-bottom:6px}}
svg{{display:block;width:100%;height:auto;font-family:inherit}}
.grid{{stroke:var(--rule);stroke-width:1}}
.axis{{stroke:var(--muted);stroke-width:1}}
.tick{{fill:var(--muted);font-size:11px}}
.label{{fill:var(--muted);font-size:11.5px}}
.line{{fill:none;stroke-width:1.7;stroke-linejoin:round}}
.faint{{opacity:.45;stroke-width:1}}
.tile{{stroke:var(--card);stroke-width:1}}
.tiletext{{fill:#fff;font-size:10px;pointer-events:none}}
{
    "".join(
        f".line.c{i}{{stroke:var(--c{i})}}.dot.c{i}{{fill:var(--c{i})}}.bg{i}{{background:var(--c{i})}}"
        f".tile.g{i}{{fill:{color}}}.map{i}{{background:{color}}}"
        for i, color in enumerate(COLORS)
    )
}
.scroll{{overflow-x:auto;background:var(--card);border:1px solid var(--rule);border-radius:8px}}
table{{border-collapse:collapse;width:100%;font-size:14px}}
th,td{{text-align:left;padding:6px 12px;border-top:1px solid var(--rule);vertical-align:top}}
thead th{{border-top:0;color:var(--muted);font-weight:600;white-space:nowrap}}
td:first-child{{color:var(--muted)}}
td:first-child,th:first-child{{position:sticky;left:0;background:var(--card)}}
td:not(:first-child){{overflow-wrap:anywhere}}
.num{{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}}
details{{margin-top:8px}}
summary{{cursor:pointer;color:var(--muted);font-size:13px;padding:4px 0}}
@media(max-width:760px){{main{{padding:18px 12px 40px}}.grid2{{grid-template-columns:minmax(0,1fr)}}
.tick{{font-size:13.5px}}.label{{font-size:14px}}.tiletext{{font-size:11px}}table{{font-size:12.5px}}
th,td{{padding:5px 4px}}td:first-child{{min-width:92px}}.head .long{{display:none}}figure{{padding:10px 8px 6px}}}}
@media(max-width:480px){{table{{font-size:11px}}th,td{{padding:5px 3px}}td:first-child{{min-width:76px}}}}
"""
