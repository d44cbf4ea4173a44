"""The looks of report.html: one style sheet, light and dark by what the reader's system prefers."""

STYLE = (
    """
:root{color-scheme:light dark;--paper:#f7f7f5;--card:#fff;--ink:#1d1f23;--soft:#63676e;--rule:#e1e2e4;
--c0:#2d6cdf;--c1:#d9661f;--c2:#1f9d6b;--c3:#8a4fd3;--c4:#c2274f;--c5:#0d93a8;--c6:#9a7b0a;--c7:#5d6673;
--bad:#b3261e;--bad-paper:#fdecea;--ok:#1b7f4c;--ok-paper:#e5f5ec;--heat:45,108,223}
@media (prefers-color-scheme:dark){:root{--paper:#14161a;--card:#1c1f25;--ink:#e7e9ec;--soft:#9aa1ab;
--rule:#2f343c;--c0:#6fa0ff;--c1:#ff9a56;--c2:#4fd19b;--c3:#bb8cff;--c4:#ff6e92;--c5:#4cc9dc;--c6:#e0bf4a;
--c7:#a3acb9;--bad:#ff8a80;--bad-paper:#3a1f1e;--ok:#6ad7a0;--ok-paper:#173527;--heat:111,160,255}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
header,main{max-width:1120px;margin:0 auto;padding:0 24px}
header{padding-top:36px;padding-bottom:8px}
h1{font-size:30px;line-height:1.2;margin:2px 0 8px;letter-spacing:-.02em;overflow-wrap:anywhere}
h2{font-size:17px;margin:0 0 12px;letter-spacing:-.01em}
h3{font-size:12px;font-weight:600;margin:0 0 4px;color:var(--soft)}
p{margin:0 0 10px}
.over,small,dt,.tick,figcaption .legend,summary{color:var(--soft)}
.over{margin:0;font-size:13px}
code,pre{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.badge{display:inline-block;padding:1px 10px;border-radius:99px;font-size:13px;font-weight:600}
.badge.ok{color:var(--ok);background:var(--ok-paper)}
.badge.bad{color:var(--bad);background:var(--bad-paper)}
section{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:20px;margin:0 0 20px}
section.failure{border-color:var(--bad);background:var(--bad-paper)}
section.failure h2{color:var(--bad)}
section.failure p{white-space:pre-wrap;overflow-wrap:anywhere}
section.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:12px 28px}
section.charts h2{grid-column:1/-1;margin-bottom:0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:16px 0 20px}
.tiles div{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:12px 16px}
dt{font-size:13px}
dd{margin:0;font-size:22px;font-weight:600;letter-spacing:-.02em;overflow-wrap:anywhere;
font-variant-numeric:tabular-nums}
small{font-size:12px}
figure{margin:8px 0 0}
figcaption{display:flex;flex-wrap:wrap;justify-content:space-between;gap:2px 14px;
font-size:14px;font-weight:600}
.legend{display:flex;flex-wrap:wrap;gap:2px 12px;font-weight:400;font-size:12px}
.key{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:5px;background:currentColor}
svg{display:block;width:100%;height:auto}
.cells{max-height:none}
.tick{font-size:11px;fill:var(--soft);font-variant-numeric:tabular-nums}
.grid{stroke:var(--rule);stroke-width:1}
.line{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round}
.dot{fill:var(--card);stroke:currentColor;stroke-width:2}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}
.c4{color:var(--c4)}.c5{color:var(--c5)}.c6{color:var(--c6)}.c7{color:var(--c7)}
"""
    + "".join(
        f".h{i}{{fill:rgba(var(--heat),{opacity});background:rgba(var(--heat),{opacity})}}\n"
        for i, opacity in enumerate((0.05, 0.12, 0.18, 0.25, 0.33, 0.42, 0.52, 0.66, 0.82, 1))
    )
    + """
.scale{font-size:12px;color:var(--soft);margin:10px 0 0}
.scale i{display:inline-block;width:16px;height:10px}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px}
th{font-weight:600;text-align:left;color:var(--soft);font-size:13px}
th,td{padding:5px 16px 5px 0;border-bottom:1px solid var(--rule);vertical-align:top;overflow-wrap:anywhere}
tr:last-child td{border-bottom:0}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
article{margin-bottom:12px}
pre{margin:0;padding:10px 14px;background:var(--paper);border-radius:8px;white-space:pre-wrap}
summary{cursor:pointer;margin-bottom:6px}
@media print{body{background:#fff}section{break-inside:avoid}}
"""
)
