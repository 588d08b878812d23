"""How the page of a comparison looks: on a light and a dark screen, on a phone, and on paper."""

from __future__ import annotations

from medseg3d.report.svg import DARK, STYLE

_LAYOUT = """
:root{color-scheme:light dark;--page:#fff;--ink:#1f2328;--muted:#59636e;--grid:#d8dee4;--soft:#f6f8fa;--best:#1a7f37}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:32px 24px 64px;background:var(--page);color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{font-size:28px;line-height:1.2;margin:0 0 8px}
h2{font-size:20px;margin:44px 0 8px;padding-top:12px;border-top:1px solid var(--grid)}
h3{font-size:16px;margin:24px 0 8px}
p{max-width:80ch;margin:8px 0}
.muted,.note,figcaption{color:var(--muted);font-size:13px}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums;margin:8px 0}
th,td{padding:5px 9px;text-align:right;border-bottom:1px solid var(--grid);vertical-align:top;white-space:nowrap}
th{font-weight:600;vertical-align:bottom}
thead th{white-space:normal;min-width:62px;border-bottom:2px solid var(--grid)}
th:first-child,td:first-child{text-align:left}
td small{display:block;color:var(--muted);font-size:11.5px}
td.best{color:var(--best);font-weight:600}
td.best small{font-weight:400}
.means tr:last-child td{border-top:2px solid var(--grid);font-weight:600}
.means small{font-weight:400}
.alike::after{content:" =";color:var(--best)}
.plots{display:flex;flex-wrap:wrap;gap:16px}
.plots figure{flex:1 1 420px;margin:0}
.three figure{flex-basis:330px}
figure{margin:12px 0}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px;max-width:none}
.legend span{white-space:nowrap}
.legend svg{vertical-align:-2px}
.swatch{display:inline-block;width:12px;height:12px;border-radius:3px;vertical-align:-1px}
.slices{display:grid;gap:10px;grid-template-columns:repeat(auto-fit,minmax(230px,1fr))}
.slices figure{margin:0;max-width:400px}
.slices img{display:block;width:100%;border-radius:6px;background:#0d1117}
@media print{
  body{max-width:none;padding:0;font-size:11pt}
  h2,h3,.legend,.muted{break-after:avoid}
  figure,table,tr{break-inside:avoid}
  .wide{overflow:visible}
  table{font-size:8pt}
  th,td{padding:3px 5px}
  .plots figure{flex-basis:45%}
  .three figure{flex-basis:30%}
  .slices{grid-template-columns:repeat(4,1fr)}
  *{print-color-adjust:exact;-webkit-print-color-adjust:exact}
}
"""
_DARK = "--page:#0d1117;--ink:#e6edf3;--muted:#8b949e;--grid:#30363d;--soft:#161b22;--best:#56d364;" + ";".join(
    f"--s{n}:{color}" for n, color in enumerate(DARK)
)

CSS = f"{_LAYOUT}@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}}}}}\n{STYLE}"
