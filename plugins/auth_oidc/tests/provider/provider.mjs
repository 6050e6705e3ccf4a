// A real OpenID provider on loopback, for the tests: `node provider.mjs PORT`.
// Its accounts and clients are what stdin says, a JSON object a line: {"accounts": {ID: claims}}.
import { createServer } from "node:http";
import { createInterface } from "node:readline";
import Provider from "oidc-provider";
import { generateKeyPairSync } from "node:crypto";

let accounts = {};
let keys = [];
let callback;
// Service accounts; their tokens have the claims of the account that is called as they are.
const resource = "urn:acme:wetware";
const service = { grant_types: ["client_credentials"], redirect_uris: [], response_types: [] };
const clients = [
  { ...service, client_id: "ci", client_secret: "a+secret/of=ci", token_endpoint_auth_method: "client_secret_basic" },
  process.env.ROBOT_JWK && {
    ...service,
    client_id: "robot",
    token_endpoint_auth_method: "private_key_jwt",
    jwks: { keys: [JSON.parse(process.env.ROBOT_JWK)] },
  },
].filter(Boolean);
const short = { ClientCredentials: Number(process.env.SERVICE_S ?? 600), AccessToken: 3600, IdToken: Number(process.env.ID_TOKEN_S ?? 3600) };

function key(kid) {
  const { privateKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
  return { ...privateKey.export({ format: "jwk" }), kid, use: "sig", alg: "ES256" };
}

const rsa = () => {
  const { privateKey } = generateKeyPairSync("rsa", { modulusLength: 2048 });
  return { ...privateKey.export({ format: "jwk" }), kid: `r${Date.now()}`, use: "sig", alg: "RS256" };
};

const server = createServer();
server.on("request", (request, response) => callback(request, response));
server.listen(Number(process.argv[2] ?? 0), "127.0.0.1", () => {
  const issuer = `http://127.0.0.1:${server.address().port}`;
  keys = [rsa(), key("e1")];
  callback = serve(issuer, keys);
  console.log(`> ${issuer}`);
});

// What was given out, in memory: it outlives the instance, which a new key needs.
const kept = new Map();
class Adapter {
  constructor(kind) {
    this.kind = kind;
  }
  id = (id) => `${this.kind}:${id}`;
  first = (name, value) => [...kept].find(([id, each]) => id.startsWith(`${this.kind}:`) && each[name] === value)?.[1];
  find = async (id) => kept.get(this.id(id));
  findByUid = async (uid) => this.first("uid", uid);
  findByUserCode = async (code) => this.first("userCode", code);
  upsert = async (id, payload) => void kept.set(this.id(id), payload);
  consume = async (id) => void (kept.get(this.id(id)).consumed = Math.floor(Date.now() / 1000));
  destroy = async (id) => void kept.delete(this.id(id));
  revokeByGrantId = async (grantId) => {
    for (const [id, each] of kept) if (each.grantId === grantId) kept.delete(id);
  };
}

// As Keycloak does, and this library does not: what the device asked for is in the token.
async function successSource(ctx) {
  const code = ctx.oidc.deviceCode;
  if (!process.env.NO_DEVICE_NONCE) {
    code.nonce = code.params.nonce;
    await code.save();
  }
  ctx.body = "done";
}

function serve(issuer, keys) {
  const provider = new Provider(issuer, {
    clients: [
      {
        client_id: "team",
        token_endpoint_auth_method: "none",
        application_type: "native",
        redirect_uris: ["http://127.0.0.1/callback"],
        response_types: ["code"],
        grant_types: ["authorization_code", "refresh_token", "urn:ietf:params:oauth:grant-type:device_code"],
        id_token_signed_response_alg: "RS256",
      },
      ...clients,
    ],
    adapter: Adapter,
    jwks: { keys },
    claims: { openid: ["sub", "groups"], email: ["email"], profile: ["name"] },
    conformIdTokenClaims: false,
    features: {
      deviceFlow: { enabled: true, successSource },
      devInteractions: { enabled: true },
      revocation: { enabled: true },
      introspection: { enabled: true },
      clientCredentials: { enabled: true },
      dPoP: { enabled: true, nonceSecret: Buffer.alloc(32, 1), requireNonce: () => true },
      resourceIndicators: {
        enabled: true,
        getResourceServerInfo: async () => ({ scope: "", audience: resource, accessTokenFormat: "jwt" }),
      },
    },
    ttl: { ...short, DeviceCode: 600, Grant: 86400, Session: 86400, RefreshToken: 86400, Interaction: 600 },
    rotateRefreshToken: true,
    extraTokenClaims: async (ctx, token) => token.kind === "ClientCredentials" ? accounts[token.clientId] : undefined,
    async findAccount(ctx, sub) {
      const claims = accounts[sub];
      return claims && { accountId: sub, claims: async () => ({ sub, ...claims }) };
    },
  });
  return provider.callback();
}

createInterface({ input: process.stdin }).on("line", (line) => {
  const said = JSON.parse(line);
  if (said.accounts) accounts = said.accounts;
  if (said.rotate) callback = serve(`http://127.0.0.1:${server.address().port}`, [rsa()]);
  console.log("> ok");
});
process.stdin.on("end", () => process.exit(0));
