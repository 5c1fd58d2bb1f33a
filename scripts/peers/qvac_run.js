// Runs QVAC's VLA engine on prepared inputs, under Bare: bare run.js JOB.json
// The job: {model, size, calls: [{images: [file], state, tokens, mask, noise, out}]}; arrays are raw little-endian files.
// Writes each call's actions (float32) to its `out` and prints the engine's hparams as one JSON line.
const fs = require('bare-fs')
const process = require('bare-process')
const { VlaModel } = (() => {
  const found = require('@qvac/vla-ggml')
  return found.VlaModel ? found : { VlaModel: found }
})()

function raw (file) {
  const bytes = fs.readFileSync(file)
  return bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength)
}

async function main () {
  const job = JSON.parse(fs.readFileSync(process.argv[2], 'utf8'))
  const model = new VlaModel({ files: { model: [job.model] }, config: { verbosity: 0 }, opts: { stats: true } })
  await model.load({ backend: 'cpu' })
  try {
    for (const call of job.calls) {
      const response = await model.run({
        images: call.images.map((file) => new Float32Array(raw(file))),
        imgWidth: job.size,
        imgHeight: job.size,
        state: new Float32Array(raw(call.state)),
        tokens: new Int32Array(raw(call.tokens)),
        mask: new Uint8Array(raw(call.mask)),
        noise: new Float32Array(raw(call.noise))
      })
      const result = await response.await()
      const a = result.actions
      fs.writeFileSync(call.out, Buffer.from(a.buffer, a.byteOffset, a.byteLength))
    }
    console.log(JSON.stringify({ hparams: model.hparams }))
  } finally {
    await model.unload()
  }
}

main().then(
  () => process.exit(0),
  (error) => {
    console.error(`${error.code || ''} ${error.message || error}`)
    process.exit(1)
  }
)
