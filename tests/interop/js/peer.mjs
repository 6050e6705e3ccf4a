// A js-libp2p peer that is driven by JSON lines: one command a line on stdin, one answer a line on stdout.
//
//   {"id": 1, "op": "listen"}                         -> {"id": 1, "ok": true, "peer": "12D3…", "addrs": […]}
//   {"id": 2, "op": "dial", "addr": "/ip4/…/p2p/…"}   -> {"id": 2, "ok": true, "peer": …, "encryption": …, …}
//   a failure                                         -> {"id": 2, "ok": false, "error": "…"}
//   a gossip message                                  -> {"event": "message", "topic": …, "data": hex, "from": …}
//
// Options (argv): --dht (serve /ipfs/kad/1.0.0), --gossipsub. The process ends when stdin does.

import { createHash, randomBytes } from 'node:crypto'
import { createInterface } from 'node:readline'
import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import { gossipsub } from '@libp2p/gossipsub'
import { identify, identifyPush } from '@libp2p/identify'
import { kadDHT, passthroughMapper } from '@libp2p/kad-dht'
import { peerIdFromString } from '@libp2p/peer-id'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'

const CHUNK_BYTES = 64 * 1024
const ECHO = '/ww-interop/echo/1.0.0'      // answers every chunk with itself
const SINK = '/ww-interop/sink/1.0.0'      // reads to the end, answers the sha256 of what it read
const SOURCE = '/ww-interop/source/1.0.0'  // reads an 8-byte length, answers that many bytes and their sha256

const services = { identify: identify(), identifyPush: identifyPush(), ping: ping() }
if (process.argv.includes('--dht')) {
  services.dht = kadDHT({
    protocol: '/ipfs/kad/1.0.0', clientMode: false, allowQueryWithZeroPeers: true,
    peerInfoMapper: passthroughMapper,
    // `/ww/…` records of the tests carry no semantics: the first one wins.
    validators: { ww: async () => {} }, selectors: { ww: () => 0 }
  })
}
if (process.argv.includes('--gossipsub')) {
  services.pubsub = gossipsub({
    allowPublishToZeroTopicPeers: true, emitSelf: false, globalSignaturePolicy: 'StrictSign'
  })
}

const node = await createLibp2p({
  start: false,
  addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  connectionGater: { denyDialMultiaddr: () => false },
  connectionMonitor: { enabled: false },
  services
})

const emit = (value) => process.stdout.write(JSON.stringify(value) + '\n')
const flat = (chunk) => (chunk instanceof Uint8Array ? chunk : chunk.subarray())
const peerOf = (text) => (text.startsWith('/') ? multiaddr(text) : peerIdFromString(text))

async function send (stream, bytes) {
  if (!stream.send(bytes)) await stream.onDrain()
}

async function * chunks (total) {
  const block = randomBytes(CHUNK_BYTES)
  for (let sent = 0; sent < total; sent += CHUNK_BYTES) {
    block.writeUInt32BE(sent / CHUNK_BYTES, 0)
    yield Uint8Array.prototype.slice.call(block, 0, Math.min(CHUNK_BYTES, total - sent))
  }
}

async function handleEcho (stream) {
  for await (const chunk of stream) await send(stream, flat(chunk))
  await stream.close()
}

async function handleSink (stream) {
  const hash = createHash('sha256')
  for await (const chunk of stream) hash.update(flat(chunk))
  await send(stream, hash.digest())
  await stream.close()
}

async function handleSource (stream) {
  let head = Buffer.alloc(0)
  for await (const chunk of stream) {
    head = Buffer.concat([head, flat(chunk)])
    if (head.length >= 8) break
  }
  const hash = createHash('sha256')
  for await (const chunk of chunks(Number(head.readBigUInt64BE(0)))) {
    hash.update(chunk)
    await send(stream, chunk)
  }
  await send(stream, hash.digest())
  await stream.close()
}

const ops = {
  async listen () {
    return { peer: node.peerId.toString(), addrs: node.getMultiaddrs().map(String) }
  },
  async dial ({ addr }) {
    const conn = await node.dial(multiaddr(addr))
    return { peer: conn.remotePeer.toString(), encryption: conn.encryption, multiplexer: conn.multiplexer }
  },
  async connections () {
    return {
      connections: node.getConnections().map((conn) => ({
        id: conn.id, peer: conn.remotePeer.toString(), addr: String(conn.remoteAddr),
        direction: conn.direction, encryption: conn.encryption, multiplexer: conn.multiplexer
      }))
    }
  },
  async hangup ({ peer }) {
    await node.hangUp(peerIdFromString(peer))
    return {}
  },
  async ping ({ peer }) {
    const start = performance.now() // its own figure is in whole milliseconds
    await node.services.ping.ping(peerOf(peer))
    return { rtt_ms: performance.now() - start }
  },
  async identify ({ peer }) {
    const [conn] = node.getConnections(peerIdFromString(peer))
    const found = await node.services.identify.identify(conn)
    return {
      peer: found.peerId.toString(), protocols: found.protocols, agent: found.agentVersion,
      addrs: found.listenAddrs.map(String), observed: found.observedAddr && String(found.observedAddr),
      signed: found.signedPeerRecord != null
    }
  },
  async echo ({ peer, data, protocol = ECHO }) {
    const stream = await node.dialProtocol(peerOf(peer), protocol)
    const expected = Buffer.from(data, 'hex')
    await send(stream, new Uint8Array(expected))
    let back = Buffer.alloc(0)
    for await (const chunk of stream) {
      back = Buffer.concat([back, flat(chunk)])
      if (back.length >= expected.length) break
    }
    await stream.close()
    return { data: back.toString('hex') }
  },
  async send ({ peer, bytes, protocol = SINK }) {
    const stream = await node.dialProtocol(peerOf(peer), protocol)
    const hash = createHash('sha256')
    const start = performance.now()
    for await (const chunk of chunks(bytes)) {
      hash.update(chunk)
      await send(stream, chunk)
    }
    await stream.close()
    let answer = Buffer.alloc(0)
    for await (const chunk of stream) answer = Buffer.concat([answer, flat(chunk)])
    return { sha256: hash.digest('hex'), answer: answer.toString('hex'), elapsed_s: (performance.now() - start) / 1e3 }
  },
  async receive ({ peer, bytes, protocol = SOURCE }) {
    const stream = await node.dialProtocol(peerOf(peer), protocol)
    const head = Buffer.alloc(8)
    head.writeBigUInt64BE(BigInt(bytes))
    const start = performance.now()
    await send(stream, new Uint8Array(head))
    const hash = createHash('sha256')
    let got = 0
    let answer = Buffer.alloc(0)
    for await (const chunk of stream) {
      const data = Buffer.from(flat(chunk))
      const body = data.subarray(0, Math.max(0, Math.min(data.length, bytes - got)))
      hash.update(body)
      got += body.length
      answer = Buffer.concat([answer, data.subarray(body.length)])
      if (answer.length >= 32) break
    }
    await stream.close()
    return { got, sha256: hash.digest('hex'), answer: answer.toString('hex'), elapsed_s: (performance.now() - start) / 1e3 }
  },
  async subscribe ({ topic }) {
    node.services.pubsub.subscribe(topic)
    return {}
  },
  async unsubscribe ({ topic }) {
    node.services.pubsub.unsubscribe(topic)
    return {}
  },
  async publish ({ topic, data }) {
    const result = await node.services.pubsub.publish(topic, Buffer.from(data, 'hex'))
    return { recipients: result.recipients.map(String) }
  },
  async subscribers ({ topic }) {
    return { peers: node.services.pubsub.getSubscribers(topic).map(String) }
  },
  async mesh ({ topic }) {
    return { peers: node.services.pubsub.getMeshPeers(topic) }
  },
  async provide ({ key }) {
    const { CID } = await import('multiformats/cid')
    for await (const event of node.services.dht.provide(CID.parse(key))) void event
    return {}
  },
  async findProviders ({ key }) {
    const { CID } = await import('multiformats/cid')
    const peers = new Set()
    for await (const event of node.services.dht.findProviders(CID.parse(key))) {
      if (event.name === 'PROVIDER' || event.name === 'PEER_RESPONSE') {
        for (const found of event.providers ?? []) peers.add(found.id.toString())
      }
    }
    return { peers: [...peers] }
  }
}

await node.handle(ECHO, handleEcho, { maxInboundStreams: 64, maxOutboundStreams: 64 })
await node.handle(SINK, handleSink)
await node.handle(SOURCE, handleSource)
node.services.pubsub?.addEventListener('message', ({ detail }) => {
  emit({
    event: 'message', topic: detail.topic, data: Buffer.from(detail.data).toString('hex'),
    from: detail.from?.toString(), seqno: detail.sequenceNumber?.toString(), signed: detail.type === 'signed'
  })
})
await node.start()
emit({ event: 'ready', peer: node.peerId.toString(), addrs: node.getMultiaddrs().map(String) })

for await (const line of createInterface({ input: process.stdin })) {
  const { id, op, ...args } = JSON.parse(line)
  Promise.resolve()
    .then(() => {
      if (ops[op] == null) throw new Error(`unknown op ${op}`)
      return ops[op](args)
    })
    .then((result) => emit({ id, ok: true, ...result }), (error) => emit({ id, ok: false, error: `${error.name}: ${error.message}` }))
}
process.exit(0)
