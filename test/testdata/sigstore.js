// Signs and verifies with unmodified sigstore-js:
//   node sigstore.js DEMO_FOLDER FILE messageSignature|dsseEnvelope BUNDLE
const fs = require('fs')
const { bundleBuilderFromSigningConfig } = require('@sigstore/sign')
const { SigningConfig, TrustedRoot } = require('@sigstore/protobuf-specs')
const { bundleToJSON } = require('@sigstore/bundle')
const { toSignedEntity, toTrustMaterial, Verifier } = require('@sigstore/verify')

async function main ([dir, file, bundleType, out]) {
  const read = (name) => JSON.parse(fs.readFileSync(`${dir}/${name}`))
  const builder = bundleBuilderFromSigningConfig({
    signingConfig: SigningConfig.fromJSON(read('signing_config.v0.2.json')),
    identityProvider: { getToken: async () => fs.readFileSync(`${dir}/token`, 'utf8').trim() },
    bundleType
  })
  const data = fs.readFileSync(file)
  const bundle = await builder.create({ data, type: 'application/vnd.in-toto+json' })
  fs.writeFileSync(out, JSON.stringify(bundleToJSON(bundle)))

  const trust = toTrustMaterial(TrustedRoot.fromJSON(read('trusted_root.json')))
  const verifier = new Verifier(trust, { ctlogThreshold: 1, tlogThreshold: 1, tsaThreshold: 1 })
  const signer = verifier.verify(toSignedEntity(bundle, data))
  console.log('verified', signer.identity.subjectAlternativeName)
  try {
    verifier.verify(toSignedEntity(bundle, Buffer.from('something else')))
  } catch {
    return
  }
  if (bundleType === 'messageSignature') throw new Error('a changed artefact verified')
}

main(process.argv.slice(2)).catch((e) => { console.error(e); process.exit(1) })
