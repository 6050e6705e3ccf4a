// Helia's UnixFS and CAR, driven by JSON lines like peer.mjs. Blocks are in memory, each command's its own.
//
//   {"id": 1, "op": "add", "entries": [{"path": "root/a", "content": base64}, {"path": "root/l", "link": "a"}],
//    "profile": …, "chunk_bytes": …, "links_max": …, "threshold_bytes": …, "car": path to write}  -> {"cid": …}
//   {"id": 2, "op": "read", "car": path}  -> {"root": …, "entries": [{"path": "a", "type": "file", "content": base64}]}

import { createWriteStream } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { createInterface } from 'node:readline'
import { once } from 'node:events'
import { car } from '@helia/car'
import { unixfs } from '@helia/unixfs'
import * as dagPb from '@ipld/dag-pb'
import { CarReader } from '@ipld/car'
import { defaultLogger } from '@libp2p/logger'
import { MemoryBlockstore } from 'blockstore-core'
import { fixedSize } from 'ipfs-unixfs-importer/chunker'
import { balanced } from 'ipfs-unixfs-importer/layout'
import { CID } from 'multiformats/cid'
import * as raw from 'multiformats/codecs/raw'

const codecs = { [dagPb.code]: dagPb, [raw.code]: raw }

function fresh () {
  const components = { blockstore: new MemoryBlockstore(), getCodec: (code) => codecs[code], logger: defaultLogger() }
  return { fs: unixfs(components), car: car(components) }
}

async function whole (chunks) {
  const found = []
  for await (const chunk of chunks) found.push(chunk)
  return Buffer.concat(found).toString('base64')
}

async function * tree (fs, cid, path) {
  for await (const entry of fs.ls(cid)) {
    const inner = path === '' ? entry.name : `${path}/${entry.name}`
    const { type, unixfs } = await fs.stat(entry.cid)
    if (type === 'directory') {
      yield { path: inner, type }
      yield * tree(fs, entry.cid, inner)
    } else if (unixfs?.type === 'symlink') {
      yield { path: inner, type: 'symlink', content: Buffer.from(unixfs.data).toString('base64') }
    } else {
      yield { path: inner, type: 'file', content: await whole(fs.cat(entry.cid)) }
    }
  }
}

const ops = {
  async add (args) {
    const helia = fresh()
    const source = args.entries.map(({ path, content, link }) => ({
      path, link, content: content == null ? undefined : Buffer.from(content, 'base64')
    }))
    let root
    for await (const added of helia.fs.addAll(source, {
      profile: args.profile,
      cidVersion: args.profile === 'unixfs-v0-2015' ? 0 : 1,
      rawLeaves: args.profile !== 'unixfs-v0-2015',
      shardSplitThresholdBytes: args.threshold_bytes,
      chunker: fixedSize({ chunkSize: args.chunk_bytes }),
      layout: balanced({ maxChildrenPerNode: args.links_max })
    })) root = added.cid
    const file = createWriteStream(args.car)
    for await (const chunk of helia.car.export(root)) file.write(Uint8Array.prototype.slice.call(chunk))
    file.end()
    await once(file, 'close')
    return { cid: root.toString() }
  },
  async read (args) {
    const helia = fresh()
    const reader = await CarReader.fromBytes(await readFile(args.car))
    const [root] = await reader.getRoots()
    await helia.car.import(reader)
    const entries = []
    for await (const entry of tree(helia.fs, CID.parse(root.toString()), '')) entries.push(entry)
    return { root: root.toString(), entries }
  }
}

const emit = (value) => process.stdout.write(JSON.stringify(value) + '\n')
emit({ event: 'ready', peer: '', addrs: [] })

for await (const line of createInterface({ input: process.stdin })) {
  const { id, op, ...args } = JSON.parse(line)
  try {
    emit({ id, ok: true, ...await ops[op](args) })
  } catch (error) {
    emit({ id, ok: false, error: `${error.name}: ${error.message}` })
  }
}
process.exit(0)
