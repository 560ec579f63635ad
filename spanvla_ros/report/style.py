"""The stylesheet and the script that every page carries."""

STYLE = """
:root{color-scheme:light dark;--page:#f5f6f8;--card:#fff;--ink:#1c2430;--soft:#5d6a7c;
--line:#dde2e9;--grid:#e9edf2;--good:#1a7f4b;--bad:#c0392b;--accent:#2563c9;
--c0:#2563c9;--c1:#d9730d;--c2:#1a7f4b;--c3:#a4388f;--c4:#0f8b9d;--c5:#b0841a;--c6:#6b7280;
--road:#dfe3e9;--marking:#b8c0cc;--ego:#2563c9;--agent:#d9730d;--person:#c0392b;--route:#8a97a8;
--ok:#2e9e63;--degraded:#e0a526;--fallback:#d9730d;--fault:#c0392b;--standby:#9aa5b4}
@media(prefers-color-scheme:dark){:root{--page:#12161c;--card:#1a2029;--ink:#e6eaf0;
--soft:#97a3b4;--line:#2b3441;--grid:#252d38;--good:#4cc38a;--bad:#f0766a;--accent:#6ea8ff;
--c0:#6ea8ff;--c1:#ff9d4d;--c2:#4cc38a;--c3:#e07fd0;--c4:#4fc8da;--c5:#e2bd5a;--c6:#9aa5b4;
--road:#2a323d;--marking:#4a5565;--ego:#6ea8ff;--agent:#ff9d4d;--person:#f0766a;--route:#65738a}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:26px;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em}
h2{font-size:16px;margin:0 0 10px}
h3{font-size:13px;font-weight:600;margin:0 0 4px;color:var(--soft)}
.summary{margin:0 0 18px;color:var(--soft);max-width:86ch}
.remark{margin:-6px 0 12px;color:var(--soft);font-size:13px;max-width:95ch}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:16px 18px;margin:16px 0;overflow:hidden}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(142px,1fr));gap:10px}
.fact{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 14px;
display:flex;flex-direction:column;border-left:4px solid var(--line)}
.fact.good{border-left-color:var(--good)}.fact.bad{border-left-color:var(--bad)}
.fact .label{font-size:12px;color:var(--soft)}
.fact .value{font-size:22px;font-weight:650;font-variant-numeric:tabular-nums}
.fact.bad .value{color:var(--bad)}
.fact .note{font-size:12px;color:var(--soft)}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:18px}
@media(max-width:900px){.columns{grid-template-columns:1fr}}
.columns>div{min-width:0}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px}
th{text-align:left;font-weight:600;color:var(--soft);font-size:12px}
th,td{padding:5px 12px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
tbody tr:last-child td{border-bottom:0}
td.n{font-variant-numeric:tabular-nums;white-space:nowrap}
td.note{color:var(--soft);font-size:12px}
td.bar{width:30%;min-width:160px}
td.bar div{position:relative;height:16px;margin-top:3px;background:var(--grid);border-radius:3px}
td.bar i{position:absolute;top:5px;height:6px;background:var(--c0);opacity:.45;border-radius:3px;
min-width:2px}
td.bar i.dot{top:3px;height:10px;width:10px;margin-left:-5px;border-radius:50%;opacity:1}
svg{display:block;width:100%;height:auto}
svg text{font:11px system-ui,sans-serif;fill:var(--soft)}
figure{margin:0 0 14px}
figcaption{font-size:12px;color:var(--soft);margin-top:4px}
.chart{margin-bottom:14px;position:relative}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:12px;color:var(--soft);
margin:0 0 4px}
.legend b{display:inline-block;width:14px;height:3px;border-radius:2px;vertical-align:middle;
margin-right:6px}
.legend b.block{height:10px;width:10px}
.tip{position:absolute;pointer-events:none;background:var(--card);border:1px solid var(--line);
border-radius:6px;padding:4px 8px;font-size:12px;white-space:nowrap;display:none;z-index:2;
box-shadow:0 2px 8px rgba(0,0,0,.15);font-variant-numeric:tabular-nums}
.picture{position:relative}
.picture svg{border-radius:6px}
.timeline{list-style:none;margin:0;padding:0;max-height:420px;overflow-y:auto}
.timeline li{display:grid;grid-template-columns:64px 1fr auto;gap:12px;padding:5px 4px;
border-bottom:1px solid var(--line);font-size:14px}
.timeline li:last-child{border-bottom:0}
.timeline time{color:var(--soft);font-variant-numeric:tabular-nums}
.tag{font-size:12px;color:var(--soft);border:1px solid var(--line);border-radius:20px;
padding:0 9px;height:21px;white-space:nowrap}
.film .frame{display:none}.film .frame.on{display:block}
.film .trio{display:grid;grid-template-columns:repeat(3,1fr);gap:8px;margin-bottom:8px}
.film .trio.one{grid-template-columns:1fr}
.controls{display:flex;gap:12px;align-items:center;margin-top:10px}
.controls input{flex:1;accent-color:var(--accent)}
.controls button{font:inherit;padding:3px 16px;border-radius:6px;border:1px solid var(--line);
background:var(--page);color:var(--ink);cursor:pointer}
.controls output{font-size:13px;color:var(--soft);min-width:64px;text-align:right;
font-variant-numeric:tabular-nums}
footer{color:var(--soft);font-size:12px;margin-top:24px}
code{font:12.5px ui-monospace,Menlo,Consolas,monospace}
"""

# Films and chart hints work without it: the first frame shows, the lines stand.
SCRIPT = """
for(const film of document.querySelectorAll('.film')){
const frames=[...film.querySelectorAll('.frame')],range=film.querySelector('input'),
button=film.querySelector('button'),label=film.querySelector('output');let timer=0;
const show=i=>{frames.forEach((f,k)=>f.classList.toggle('on',k===i));range.value=i;
label.textContent=frames[i].dataset.label};
const stop=()=>{clearInterval(timer);timer=0;button.textContent='Play'};
range.addEventListener('input',()=>{stop();show(+range.value)});
button.addEventListener('click',()=>{if(timer){stop();return}button.textContent='Pause';
timer=setInterval(()=>show((+range.value+1)%frames.length),+film.dataset.period)});show(+range.value)}
for(const chart of document.querySelectorAll('.chart[data-points]')){
const data=JSON.parse(chart.dataset.points),svg=chart.querySelector('svg'),
tip=chart.querySelector('.tip'),rule=svg.querySelector('.rule');
svg.addEventListener('mousemove',event=>{const box=svg.getBoundingClientRect(),
x=(event.clientX-box.left)/box.width*data.width,
t=data.from+(x-data.left)/(data.right-data.left)*(data.to-data.from);
if(t<data.from||t>data.to)return;
rule.setAttribute('x1',x);rule.setAttribute('x2',x);rule.style.display='';
tip.innerHTML='<b>'+t.toFixed(2)+' '+data.across+'</b>'+data.series.map(s=>{let k=0;
while(k+1<s.t.length&&Math.abs(s.t[k+1]-t)<=Math.abs(s.t[k]-t))k++;
return s.t.length?'<br>'+s.name+': '+s.v[k]+' '+data.unit:''}).join('');
tip.style.display='block';const left=(event.clientX-box.left)+14;
tip.style.left=Math.min(left,box.width-tip.offsetWidth-4)+'px';tip.style.top='26px'});
svg.addEventListener('mouseleave',()=>{tip.style.display='none';rule.style.display='none'})}
"""
