const {spawn}=require('child_process');
for (const a of [[],['How many circles are there?']]) { const c=spawn(process.env.G,['generate','-m','plain','-q',...a],{stdio:['pipe','pipe','pipe']}); let o=''; c.stdout.on('data',d=>o+=d); c.stderr.on('data',d=>o+=d); c.on('close',r=>console.log(JSON.stringify(a),'rc',r,o.trim())); c.stdin.end('Who was Napoleon?\n'); }
