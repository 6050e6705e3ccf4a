// Helia's UnixFS over its bitswap, for tests/bench/bench_blob.py; two of them, in a process each.
//
//   node bitswap.mjs serve MIB     prints {"addr": …, "cid": …} of a random file, and serves it until stdin ends
//   node bitswap.mjs get ADDR CID  prints {"seconds": …, "bytes": …, "first_seconds": …} and ends
//
// Blocks are in memory at who serves, and who gets keeps none. Of Helia these are the parts that move blocks:
// @helia/libp2p, which bitswap names for its types alone, would bring 200 packages (see "overrides").

import { randomBytes } from 'node:crypto'
import { withBitswap } from '@helia/bitswap'
import { unixfs } from '@helia/unixfs'
import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import { identify } from '@libp2p/identify'
import { tcp } from '@libp2p/tcp'
import { multiaddr } from '@multiformats/multiaddr'
import * as dagPb from '@ipld/dag-pb'
import { MemoryBlockstore } from 'blockstore-core'
import { fixedSize } from 'ipfs-unixfs-importer/chunker'
import { balanced } from 'ipfs-unixfs-importer/layout'
import { createLibp2p } from 'libp2p'
import { CID } from 'multiformats/cid'
import * as raw from 'multiformats/codecs/raw'
import { sha256 } from 'multiformats/hashes/sha2'

const MIB = 1 << 20
const codecs = { [dagPb.code]: dagPb, [raw.code]: raw }

const libp2p = await createLibp2p({
  addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  connectionGater: { denyDialMultiaddr: () => false },
  services: { identify: identify() }
})
const blockstore = new MemoryBlockstore()
const helia = {
  status: 'starting',
  libp2p,
  blockstore,
  logger: libp2p.logger,
  routing: { async * findProviders () {} },
  getCodec: (code) => codecs[code],
  getHasher: () => sha256,
  hasBlockBroker: () => false,
  addBlockBroker (broker) { this.broker = broker },
  addMixin (mixin) { this.mixin = mixin }
}
await withBitswap(helia).mixin.start(helia)
const emit = (value) => process.stdout.write(JSON.stringify(value) + '\n')

async function * random (count) {
  for (let each = 0; each < count; each++) yield randomBytes(MIB)
}

const ops = {
  async serve (count) {
    const cid = await unixfs(helia).addByteStream(random(Number(count)), {
      rawLeaves: true, chunker: fixedSize({ chunkSize: MIB }), layout: balanced({ maxChildrenPerNode: 1024 })
    })
    emit({ addr: libp2p.getMultiaddrs()[0].toString(), cid: cid.toString() })
    process.stdin.resume()
    await new Promise((resolve) => process.stdin.on('end', resolve))
  },
  async get (addr, cid) {
    await libp2p.dial(multiaddr(addr))
    const network = { async * get (wanted, options) { yield await helia.broker.retrieve(wanted, options) } }
    const start = performance.now()
    let bytes = 0
    let first
    for await (const piece of unixfs({ ...helia, blockstore: network }).cat(CID.parse(cid))) {
      first ??= performance.now()
      bytes += piece.length
    }
    emit({ seconds: (performance.now() - start) / 1000, bytes, first_seconds: (first - start) / 1000 })
  }
}
const [op, ...args] = process.argv.slice(2)
await ops[op](...args)
process.exit(0)
