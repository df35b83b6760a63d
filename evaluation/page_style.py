"""Style sheets and scripts of the HTML pages: of the demo, and of the results of an evaluation.

Two palettes of eight colours that stay apart for colour-blind readers: a bright one for boxes on radiographs and for
the dark theme, a dark one (contrast above 4.5 on white) for text and lines of the light theme.
"""

BRIGHT = ("#5ab4ff", "#ffa23a", "#4bd18b", "#ff7eb6", "#f5d547", "#b99cff", "#43d9d9", "#ff7a6b")
DARK = ("#0b63b5", "#a85400", "#0b7a45", "#b3246a", "#7a6400", "#6741c7", "#00707a", "#b8321f")
SCRIPT = """
document.querySelectorAll('[data-show]').forEach(function (line) {
  var film = line.closest('article');
  function mark(on) {
    film.classList.toggle('asking', on);
    film.querySelectorAll('[data-group="' + line.dataset.show + '"]').forEach(function (box) {
      box.classList.toggle('lit', on);
    });
  }
  line.addEventListener('mouseenter', function () { mark(true); });
  line.addEventListener('mouseleave', function () { mark(false); });
  line.addEventListener('focus', function () { mark(true); });
  line.addEventListener('blur', function () { mark(false); });
});
"""
STYLE = (
    ":root{--bg:#f6f7f9;--panel:#fff;--ink:#171a21;--soft:#5b6472;--line:#dfe3ea;--track:#e8ebf1;--accent:#0b63b5;"
    "--good:#0b6b3e;--goodbg:#dcf3e6;--short:#8a4500;--shortbg:#fdebd5;"
    + "".join(f"--t{i}:{c};" for i, c in enumerate(DARK))
    + "}@media screen and (prefers-color-scheme:dark){:root{--bg:#0e1116;--panel:#171b22;--ink:#e8ebf0;--soft:#9aa4b2;"
    "--line:#2a303a;--track:#262c36;--accent:#5ab4ff;--good:#7be0ab;--goodbg:#123524;--short:#ffc38a;"
    "--shortbg:#3b2711;" + "".join(f"--t{i}:{c};" for i, c in enumerate(BRIGHT)) + "}}"
    """
*{box-sizing:border-box}
html{scroll-behavior:smooth;scroll-padding-top:3.5rem;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif}
.wrap{max-width:1240px;margin:0 auto;padding:0 clamp(16px,4vw,40px)}
body>header{background:linear-gradient(160deg,#10233b,#0b1420 70%);color:#eef3f9;padding:clamp(28px,6vw,64px) 0 28px}
h1{font-size:clamp(1.7rem,4.5vw,2.8rem);line-height:1.12;margin:0 0 .6rem;letter-spacing:-.02em}
.lead{max-width:46rem;font-size:clamp(1rem,2vw,1.15rem);color:#c7d3e2;margin:0 0 1rem}
.lead strong{color:#fff;font-weight:600}
.warning{display:inline-flex;gap:.55rem;align-items:center;margin:0 0 1.1rem;padding:.35rem .9rem .35rem .4rem;
border-radius:99px;background:#ffcf5c;color:#2b1f00;font-weight:600;font-size:.92rem}
.warning b{display:grid;place-items:center;width:1.4em;height:1.4em;border-radius:50%;background:#2b1f00;color:#ffcf5c}
.facts{list-style:none;display:flex;flex-wrap:wrap;gap:.4rem 1.6rem;margin:0;padding:0;font-size:.92rem}
.facts span{color:#8fa5bf;margin-right:.2rem}
nav{position:sticky;top:0;z-index:5;background:color-mix(in srgb,var(--panel) 92%,transparent);
backdrop-filter:blur(8px);border-bottom:1px solid var(--line)}
nav .wrap{display:flex;gap:1.4rem;overflow-x:auto;scrollbar-width:none}
nav a{color:var(--soft);text-decoration:none;padding:.75rem 0;white-space:nowrap;font-size:.92rem;font-weight:500}
nav a:hover,nav a:focus-visible{color:var(--accent)}
main>section{padding-top:clamp(28px,5vw,52px)}
h2{font-size:clamp(1.3rem,3vw,1.7rem);letter-spacing:-.01em;margin:0 0 1rem}
h3{font-size:1.02rem;margin:0}h4{font-size:.78rem;text-transform:uppercase;letter-spacing:.07em;color:var(--soft);
margin:0 0 .5rem;font-weight:600}
.cards{display:grid;gap:16px;grid-template-columns:repeat(auto-fit,minmax(min(100%,310px),1fr))}
.card,.explained,.stage,.gallery figure{background:var(--panel);border:1px solid var(--line);border-radius:14px;
padding:18px 20px}
.card header{display:flex;justify-content:space-between;gap:.6rem;align-items:center}
.badge{font-size:.75rem;font-weight:600;padding:.12rem .6rem;border-radius:99px;background:var(--track);
color:var(--soft);white-space:nowrap}
.badge.good{background:var(--goodbg);color:var(--good)}.badge.short{background:var(--shortbg);color:var(--short)}
.figure{margin:.25rem 0 0;display:flex;align-items:baseline;gap:.5rem}
.figure strong{font-size:2.1rem;letter-spacing:-.02em;font-variant-numeric:tabular-nums;line-height:1.2}
.figure small,.muted{color:var(--soft)}.muted{font-size:.88rem;margin:.5rem 0 0}
.bullet{width:100%;display:block;overflow:visible}
.track{fill:var(--track)}.value{fill:var(--accent)}
path.baseline{stroke:var(--ink);stroke-width:2.5}path.target{fill:var(--ink)}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin:.3rem 0 0;font-size:.84rem;color:var(--soft)}
.legend span{display:inline-flex;align-items:center;gap:.45rem}
.key{display:inline-block;width:14px;height:14px}
.key.baseline{width:3px;background:var(--ink)}
.key.target{width:0;height:0;border:6px solid transparent;border-top:9px solid var(--ink);border-bottom:0}
.key.line{height:3px;width:18px;border-radius:2px;background:currentColor}
.key.hit,.key.false,.key.dashkey,.key.misskey{border-radius:3px;border:2.5px solid}
.key.hit{border-color:#2f8fe8}.key.false{border-color:#e07a00}.key.dashkey{border:2px dashed var(--soft)}
.key.misskey{border:2.5px dashed #d6448f}
details{margin-top:16px}summary{cursor:pointer;color:var(--accent);font-weight:500;font-size:.95rem}
.scroll{overflow-x:auto;margin-top:.7rem;background:var(--panel);border:1px solid var(--line);border-radius:14px}
table{border-collapse:collapse;width:100%;font-size:.93rem}
th,td{padding:.5rem .9rem;text-align:left;border-bottom:1px solid var(--line);font-weight:400;white-space:nowrap}
thead th{color:var(--soft);font-size:.82rem;font-weight:600}tbody tr:last-child>*{border-bottom:0}
.n{text-align:right;font-variant-numeric:tabular-nums}
td meter{width:clamp(40px,6vw,90px);margin-right:.7rem;vertical-align:middle}
.narrow th,.narrow td{padding:.28rem .6rem .28rem 0}.narrow th{color:var(--soft)}
.explained{margin-bottom:18px;padding:clamp(14px,2.5vw,24px)}.explained h3{margin-bottom:.9rem}
.split{display:grid;gap:clamp(16px,3vw,32px);grid-template-columns:minmax(0,1fr)}
@media(min-width:860px){.split{grid-template-columns:minmax(0,9fr) minmax(0,10fr)}}
figure{margin:0}figcaption{font-size:.86rem;color:var(--soft);margin-top:.55rem}
figcaption i{display:inline-block;width:22px;height:0;border-top:3px solid var(--soft);margin:0 .45rem 0 0;
vertical-align:middle}figcaption i.dash{border-top-style:dashed;margin-left:1.2rem}
.film{display:block;width:100%;height:auto;border-radius:10px;background:#000}
.box{fill:transparent;stroke-width:2.6;vector-effect:non-scaling-stroke;stroke:#cfd6df;transition:opacity .15s}
.box.dashed{stroke-dasharray:6 5;stroke-width:2}
.tag rect{fill:#cfd6df}.tag text{fill:#0b0f14;font-weight:700;font-family:system-ui,sans-serif}
.quiet{opacity:0;pointer-events:none}
.asking .box:not(.lit),.asking .tag:not(.lit){opacity:.12}.lit{opacity:1!important}
.chit{stroke:#5ab4ff}.cfalse{stroke:#ffa23a}.cmiss{stroke:#ff7eb6}
.tag.chit rect{fill:#5ab4ff}.tag.cfalse rect{fill:#ffa23a}.tag.cmiss rect{fill:#ff7eb6}.tag{stroke:none!important}
.reports{display:grid;gap:1.3rem;align-content:start}
.reports ol{list-style:none;margin:0;padding:0;display:grid;gap:.3rem}
.reports li{display:flex;gap:.65rem;align-items:baseline;padding:.28rem .5rem;margin:0 -.5rem;border-radius:8px}
.reports li[data-show]{cursor:default}.reports li[data-show]:hover,.reports li:focus-visible{background:var(--track);
outline:none}
.reports b{flex:none;display:grid;place-items:center;min-width:1.55em;height:1.55em;border-radius:7px;
font-size:.8rem;background:var(--tc);color:var(--panel)}
.reports small{display:block;color:var(--soft);font-size:.8rem;line-height:1.35}
.tn{color:var(--soft)}.reports .tn b{background:var(--track);color:var(--soft)}
.gallery{display:grid;gap:16px;grid-template-columns:repeat(auto-fill,minmax(min(100%,270px),1fr));margin-top:.8rem}
.gallery figure{padding:12px}.gallery strong{color:var(--ink)}
.stage{margin-bottom:18px}
.stage p{margin:.35rem 0 0}.stage .charts{margin:1rem 0 0}
@media(min-width:980px){.stage{display:grid;grid-template-columns:210px minmax(0,1fr);gap:28px}.stage .charts{margin:0;
display:flex;flex-wrap:wrap}.stage .charts figure{flex:1 1 260px;max-width:400px}}
.charts{display:grid;gap:22px 28px;margin-top:.9rem;
grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr))}
.charts figcaption{margin:0 0 .3rem;font-weight:600;color:var(--ink)}
.chart,.bars{width:100%;height:auto;display:block}
.chart text,.bars text{font:12.5px system-ui,sans-serif;fill:var(--soft)}.chart .label{fill:var(--ink);font-size:13px}
.bars text{font-size:14px;fill:var(--ink)}.bars .number{fill:var(--soft);font-variant-numeric:tabular-nums}
.bar{fill:var(--accent)}.grid{stroke:var(--line)}.axis,.tick{stroke:var(--soft);fill:none}
.line{fill:none;stroke:currentColor;stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}
.raw{opacity:.22;stroke-width:1.2}.chart circle{fill:currentColor;stroke:var(--panel);stroke-width:1.2}
.charts h3{margin-bottom:.6rem}pre{background:var(--panel);border:1px solid var(--line);border-radius:12px;
padding:14px 16px;overflow-x:auto;font-size:.88rem;margin:.6rem 0 1.4rem}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.regions{list-style:none;padding:0;margin:.6rem 0 0;display:grid;gap:.15rem 2rem;
grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));font-size:.9rem}
.regions li{display:grid;grid-template-columns:12.5rem 1fr 2.4rem;gap:.6rem;align-items:center}
.regions b{font-weight:500;font-variant-numeric:tabular-nums;text-align:right}
meter{width:100%;height:9px;border:0;border-radius:5px;background:var(--track);overflow:hidden;appearance:none}
meter::-webkit-meter-bar{background:var(--track);border:0;border-radius:5px;height:9px}
meter::-webkit-meter-optimum-value{background:var(--accent);border-radius:5px}
meter::-moz-meter-bar{background:var(--accent)}
#details h3{margin-top:1.6rem}footer{padding-top:40px;padding-bottom:48px;color:var(--soft);font-size:.88rem}
@media print{nav{display:none}.card,.explained,.stage{break-inside:avoid}}
@media(prefers-reduced-motion:reduce){html{scroll-behavior:auto}.box{transition:none}}
"""
    + "".join(
        f".c{i}{{stroke:{c}}}.tag.c{i} rect{{fill:{c}}}"
        f".t{i}{{--tc:var(--t{i});color:var(--tc)}}.s{i}{{color:var(--t{i})}}"
        for i, c in enumerate(BRIGHT)
    )
).replace("\n", "")


# --- results of an evaluation ---

# Selecting a sentence pins its boxes; pointing at one or moving the focus to it shows them for as long as that lasts.
# Without script all boxes are visible in the colours of their sentences.
RESULTS_SCRIPT = """
(function () {
  function show(article, key) {
    article.classList.toggle('asking', key !== null);
    article.querySelectorAll('[data-group]').forEach(function (box) {
      box.classList.toggle('lit', box.dataset.group === key);
    });
  }
  function pinned(article) {
    var line = article.querySelector('[data-show][aria-pressed=true]');
    return line ? line.dataset.show : null;
  }
  function pin(article, key) {
    article.querySelectorAll('[data-show]').forEach(function (line) {
      line.setAttribute('aria-pressed', String(key !== null && line.dataset.show === key));
    });
    show(article, key);
  }
  document.querySelectorAll('article.example').forEach(function (article) {
    article.querySelectorAll('[data-show]').forEach(function (line) {
      var key = line.dataset.show;
      function preview() { show(article, key); }
      function back() { show(article, pinned(article)); }
      line.addEventListener('mouseenter', preview);
      line.addEventListener('focus', preview);
      line.addEventListener('mouseleave', back);
      line.addEventListener('blur', back);
      line.addEventListener('click', function () { pin(article, pinned(article) === key ? null : key); });
    });
    article.querySelectorAll('rect[data-group]').forEach(function (box) {
      var key = box.dataset.group;
      box.addEventListener('click', function () { pin(article, pinned(article) === key ? null : key); });
    });
  });
  document.addEventListener('keydown', function (event) {
    if (event.key === 'Escape') {
      document.querySelectorAll('article.example').forEach(function (article) { pin(article, null); });
    }
  });
  var closed = [];
  window.addEventListener('beforeprint', function () {
    closed = Array.from(document.querySelectorAll('details:not([open])'));
    closed.forEach(function (part) { part.open = true; });
  });
  window.addEventListener('afterprint', function () {
    closed.forEach(function (part) { part.open = false; });
  });
})();
"""
# Classes of the drawings of `evaluation.plots`, for the page and for files of their own.
PLOT_STYLE = """
.ring{fill:none;stroke:var(--line);stroke-width:1}.spoke{stroke:var(--line);stroke-width:1}
.axisname{font:600 13px system-ui,sans-serif;fill:var(--ink)}
.detail{font-weight:400;font-size:12px;fill:var(--soft)}
.ringname{font:11px system-ui,sans-serif;fill:var(--soft);paint-order:stroke;stroke:var(--paper);stroke-width:3.5px;
stroke-linejoin:round}
.radarline{fill:none;stroke-width:1.6;stroke-linejoin:round;stroke-linecap:round}
.radarline.ours{stroke:var(--t0);stroke-width:2.8}.radarline.area.ours{fill:var(--t0);fill-opacity:.13}
.radarline.reference{stroke:var(--soft);stroke-width:1.8;stroke-dasharray:5 4}
.radarline.other0{stroke:var(--t1)}.radarline.other1{stroke:var(--t2)}.radarline.other2{stroke:var(--t3)}
.radarline.other3{stroke:var(--t5)}
.mark{stroke:var(--paper);stroke-width:1}.mark.ours{fill:var(--t0)}.mark.reference{fill:var(--soft)}
.mark.other0{fill:var(--t1)}.mark.other1{fill:var(--t2)}.mark.other2{fill:var(--t3)}.mark.other3{fill:var(--t5)}
.mark.open{fill:none;stroke-width:2}.mark.open.other3{stroke:var(--t5)}
.chart text{font:12.5px system-ui,sans-serif;fill:var(--soft)}.chart .label{fill:var(--ink)}
.chart.small text{font-size:11.5px}.line{fill:none;stroke-width:2.2;stroke-linejoin:round}
.line.ours{stroke:var(--t0)}.fill{fill:var(--t0);fill-opacity:.1}.bar{fill:var(--t0);fill-opacity:.55}
.ideal{stroke:var(--soft);stroke-dasharray:5 4;fill:none}.grid{stroke:var(--line);fill:none}
.axis{stroke:var(--soft);fill:none}.paper{fill:var(--paper)}
""".replace("\n", "")
RESULTS_STYLE = (
    ":root{--paper:var(--panel)}"
    + PLOT_STYLE
    + """
.skip{position:absolute;left:-999px}.skip:focus{left:8px;top:8px;z-index:9;background:var(--panel);padding:.4rem .8rem}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.results :focus-visible{outline:2px solid var(--accent);outline-offset:2px}
.results .lead+.lead{margin-top:-.4rem}.results .warning{border-radius:14px;padding-right:1rem}
.results .warning b{flex:none}.facts li{overflow-wrap:anywhere}
.results table small{display:block;color:var(--soft);font-size:.8rem;line-height:1.3;white-space:normal}
.results thead th{vertical-align:bottom;line-height:1.3}.results thead small{font-weight:400}
.results th,.results td{vertical-align:baseline}.results sup{font-size:.68em;color:var(--soft);margin-left:.1em;
line-height:0}
.scroll:not(:has(.overview)) tr>:first-child{position:sticky;left:0;background:var(--panel);z-index:1}
.reason{max-width:34rem}.pub small{margin-left:auto;max-width:14rem}
.results .pub.muted{margin:0;font-size:inherit;font-style:italic}
.results .none{text-align:left}.value strong{font-size:1.1rem}
.strip{width:140px;height:auto;display:block;overflow:visible}.stripcell{vertical-align:middle!important}
.strip .base{stroke:var(--line);stroke-width:1.5;fill:none}.strip .span{stroke:var(--t0);stroke-width:6;
stroke-opacity:.4;stroke-linecap:round}.strip .dot{fill:var(--t0);stroke:var(--paper);stroke-width:1}
.strip .published{fill:var(--soft)}
.key.dotkey{width:22px;height:8px;border-radius:5px;background:radial-gradient(circle,var(--t0) 3.6px,
color-mix(in srgb,var(--t0) 45%,transparent) 4px)}
.key.trianglekey{width:0;height:0;border:5px solid transparent;border-bottom:8px solid var(--soft);border-top:0}
.overview th small{font-size:.83rem;font-weight:400}.overview a{color:inherit;text-decoration-color:var(--soft);
text-underline-offset:3px}.overview a:hover{color:var(--accent)}
.radarfigure{margin-top:26px;background:var(--panel);border:1px solid var(--line);border-radius:14px;
padding:clamp(14px,2.5vw,26px);display:grid;gap:10px 30px;align-items:center}
.radarfigure figcaption{margin:0;font-size:1rem;color:var(--ink);align-self:start}
.radarfigure figcaption .muted{max-width:34rem}.radar{width:100%;max-width:580px;margin:0 auto;display:block;
overflow:visible}
@media(min-width:980px){.radarfigure{grid-template-columns:minmax(0,2fr) minmax(0,3fr)}}
.radarlegend{list-style:none;margin:1rem 0 0;padding:0;display:grid;gap:.35rem;font-size:.95rem}
.radarlegend li{display:flex;gap:.7rem;align-items:center;overflow-wrap:anywhere}
.legendmark{width:42px;height:20px;flex:none}
.task{background:var(--panel);border:1px solid var(--line);border-radius:14px;padding:clamp(14px,2.5vw,24px);
margin-bottom:18px;scroll-margin-top:3.5rem}
.task>header{display:flex;flex-wrap:wrap;gap:.4rem .9rem;align-items:center}.task h3{font-size:1.15rem}
.task>.muted{margin-top:.25rem}.task .scroll,.examples .scroll{border-radius:10px}
.task h4,.publishedtables h4{margin:1.1rem 0 .4rem}
.notes{margin:.9rem 0 0;padding-left:1.15rem;color:var(--soft);font-size:.9rem}
.num{display:inline-block;min-width:2.7em}
.curves{display:grid;gap:14px 18px;margin-top:.8rem;grid-template-columns:repeat(auto-fill,minmax(min(46%,190px),1fr))}
.curves figcaption{margin:0 0 .15rem;color:var(--ink);font-size:.86rem;font-weight:600;line-height:1.25}
.curves small{font-weight:400;color:var(--soft);display:block}.chart.small{max-width:250px;margin-top:auto}
.curves figure{display:flex;flex-direction:column}.number{white-space:nowrap;position:relative}
.marks{position:absolute;left:100%;top:-.1em}.publishedtables td,.publishedtables th{padding:.4rem .75rem}
.calibrated{display:flex;flex-wrap:wrap;gap:8px 26px;align-items:center;margin-top:.8rem}
.calibrated .chart{flex:0 1 330px;min-width:0;width:100%}.calibrated p{flex:1 1 240px;max-width:30rem}
.facts-table{width:auto;max-width:100%}.facts-table th,.facts-table td{white-space:normal;overflow-wrap:anywhere;
padding-right:1.4rem}.facts-table th{min-width:7rem}.plain td{font-variant-numeric:tabular-nums}
.runs{display:grid;gap:20px 36px;grid-template-columns:repeat(auto-fill,minmax(min(100%,360px),1fr));
align-items:start}.runs h3{margin-bottom:.3rem}
.results pre{white-space:pre-wrap;overflow-wrap:anywhere}
.publishedtables .own>*{font-weight:650}
.examples{margin-top:18px}.examples summary{font-size:1.02rem}.examples summary small{color:var(--soft);
font-weight:400;margin-left:.5rem}
.examples h4{margin:1rem 0 .3rem}
.results .gallery{grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));align-items:start}
.example{background:var(--panel);border:1px solid var(--line);border-radius:14px;padding:14px;min-width:0}
.results .gallery figure{background:none;border:0;border-radius:0;padding:0}
.example.wide{grid-column:1/-1;padding:clamp(14px,2vw,22px)}.examplehead{margin:0 0 .6rem;overflow-wrap:anywhere}
.examplehead small{color:var(--soft);margin-left:.5rem;white-space:nowrap}
.pair{display:grid;gap:14px}
@media(min-width:760px){.example.wide .pair{grid-template-columns:minmax(0,5fr) minmax(0,7fr);gap:28px;
align-items:start}.example.wide figure{position:sticky;top:3.6rem}}
.example figcaption{min-height:1.4em}.example figcaption i.solid+i,.example figcaption i.dash{margin-left:0}
.example figcaption i+i,.example figcaption i.dash:not(:first-child){margin-left:1.1rem}
.results .reports{gap:1rem;min-width:0}.results .reports ol{gap:.1rem}
.results .reports li{padding:0;margin:0 -.5rem;overflow-wrap:anywhere}
.results .reports li:not(:has(button)){padding:.28rem .5rem}
.reports button{all:unset;box-sizing:border-box;display:flex;gap:.65rem;align-items:baseline;width:100%;
padding:.28rem .5rem;border-radius:8px;cursor:pointer}
.reports button:hover,.reports button:focus-visible{background:var(--track)}
.reports button:focus-visible{outline:2px solid var(--accent)}
.reports button[aria-pressed=true]{background:var(--track);box-shadow:inset 3px 0 0 var(--tc)}
.example rect[data-group]{cursor:pointer;pointer-events:all}
.example .box{fill-opacity:.06}.example .box.lit{fill-opacity:.16}
.example:not(.wide) .reports li{font-size:.92rem}
"""
    + "".join(f".box.c{i}{{fill:{c}}}" for i, c in enumerate(BRIGHT))
    + """
@media screen and (max-width:760px){
.overview thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.overview,.overview tbody{display:block}.overview tr{display:grid;grid-template-columns:repeat(6,1fr);gap:.4rem .8rem;
padding:.9rem 1rem;border-bottom:1px solid var(--line)}.overview tr:last-child{border:0}
.overview th,.overview td{padding:0;border:0;text-align:left;white-space:normal;grid-column:span 2}
.overview td.pub{grid-column:span 3}
.overview th{grid-column:1/-1;font-weight:600}.overview td.n{text-align:left}
.overview td::before{content:attr(data-label);display:block;font-size:.78rem;color:var(--soft);font-style:normal}
.overview .none{grid-column:span 4}.overview .stripcell{grid-column:1/-1}.overview .stripcell::before{display:none}
.overview .stripcell:empty{display:none}
.overview .strip{width:100%;max-width:300px}.overview .pub small{margin-left:0}
.results .scroll th:first-child,.results .scroll td:first-child{white-space:normal;min-width:5.4rem}
.results .scroll:not(:has(.overview)) th,.results .scroll:not(:has(.overview)) td{padding:.42rem .5rem;
font-size:.88rem}
td meter{display:none}
}
@media screen and (min-width:761px){.radar .axisname{font-size:11px}.radar .detail{font-size:10px}
.radar .ringname{font-size:9px}}
@media print,(min-width:761px) and (max-width:1180px){.overview .stripcell,.overview thead th:nth-child(5),
.striplegend{display:none}}
@media print{
body>header{background:none!important;color:#000;padding:0 0 12px}.lead,.facts span,.lead strong{color:#333}
.task,.example,.radarfigure,tr,figure{break-inside:avoid}.task{break-inside:auto}.scroll{overflow:visible}
body{font-size:11pt;-webkit-print-color-adjust:exact;print-color-adjust:exact}.warning{border:1px solid #000}
.example.wide figure{position:static!important}.wrap{max-width:none;padding:0}
th,td{white-space:normal!important;padding:.25rem .45rem!important;font-size:9.5pt}.skip{display:none}
.scroll tr>:first-child{position:static!important}details>summary{list-style:none}
}
"""
).replace("\n", "")
_ROOT = (
    "svg{--paper:#fff;--ink:#171a21;--soft:#5b6472;--line:#dfe3ea;"
    + "".join(f"--t{i}:{c};" for i, c in enumerate(DARK))
    + "}@media(prefers-color-scheme:dark){svg{--paper:#171b22;--ink:#e8ebf0;--soft:#9aa4b2;--line:#2a303a;"
    + "".join(f"--t{i}:{c};" for i, c in enumerate(BRIGHT))
    + "}}"
)
# For SVG files.
FIGURE_STYLE = _ROOT + PLOT_STYLE
