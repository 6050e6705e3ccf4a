// Standard JSON in on stdin, standard JSON out on stdout, by the solc of package.json, checked.
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'

const require = createRequire(import.meta.url)
const solc = require('solc')
const pinned = require('./package.json').dependencies.solc
if (!solc.version().startsWith(`${pinned}+`)) {
  console.error(`solc ${solc.version()} is installed, ${pinned} is pinned; run: npm ci`)
  process.exit(1)
}
const output = JSON.parse(solc.compile(readFileSync(0, 'utf8')))
process.stdout.write(JSON.stringify({ version: solc.version(), output }))
