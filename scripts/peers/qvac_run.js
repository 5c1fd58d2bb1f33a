// Runs QVAC's VLA engine on prepared inputs, under Bare: bare run.js JOB.json
// The job: {model, size, calls: [{images: [file], state, tokens, mask, noise, out}]}; arrays are raw little-endian files.
// Writes each call's actions (float32) to its `out` and prints the engine's hparams as one JSON line.
// Or {serve: model}: loads it and answers one call (a line of JSON like those above, with its size) with a line of
// milliseconds, until stdin ends. Or {probe: [model]}: loads each and runs it once on inputs that fit its own sizes; one JSON line before and one after,
// so that whoever reads them knows which file ended the process.
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

async function probe (file) {
  const model = new VlaModel({ files: { model: [file] }, config: { verbosity: 0 }, opts: { stats: true } })
  try {
    await model.load({ backend: 'cpu' })
    const h = model.hparams
    const size = h.visionImageSize
    const response = await model.run({
      images: [new Float32Array(3 * size * size).fill(0.25)],
      imgWidth: size,
      imgHeight: size,
      state: new Float32Array(h.maxStateDim).fill(0.5),
      tokens: Int32Array.from([0, 0, 0, 0]),
      mask: Uint8Array.from([1, 1, 1, 0]),
      noise: new Float32Array(h.chunkSize * h.maxActionDim).fill(0.125)
    })
    const result = await response.await()
    return { ran: result.actions.length, finite: result.actions.every(Number.isFinite) }
  } catch (error) {
    return { refused: `${error.code || ''} ${error.message || error}` }
  } finally {
    await model.unload().catch(() => {})
  }
}

async function answer (model, size, call) {
  const response = await model.run({
    images: call.images.map((file) => new Float32Array(raw(file))),
    imgWidth: size,
    imgHeight: size,
    state: new Float32Array(raw(call.state)),
    tokens: new Int32Array(raw(call.tokens)),
    mask: new Uint8Array(raw(call.mask)),
    noise: new Float32Array(raw(call.noise))
  })
  const result = await response.await()
  const a = result.actions
  fs.writeFileSync(call.out, Buffer.from(a.buffer, a.byteOffset, a.byteLength))
}

async function serve (model) {
  let text = ''
  for await (const part of process.stdin) {
    text += part.toString()
    for (let end = text.indexOf('\n'); end >= 0; end = text.indexOf('\n')) {
      const call = JSON.parse(text.slice(0, end))
      text = text.slice(end + 1)
      const began = Date.now()
      await answer(model, call.size, call)
      console.log(JSON.stringify({ ms: Date.now() - began }))
    }
  }
}

async function main () {
  const job = JSON.parse(fs.readFileSync(process.argv[2], 'utf8'))
  for (const file of job.probe || []) {
    console.log(JSON.stringify({ begin: file }))
    console.log(JSON.stringify({ end: file, ...(await probe(file)) }))
  }
  if (job.probe) return
  const file = job.serve || job.model
  const model = new VlaModel({ files: { model: [file] }, config: { verbosity: 0 }, opts: { stats: true } })
  await model.load({ backend: 'cpu' })
  try {
    if (job.serve) {
      console.log(JSON.stringify({ ready: true }))
      await serve(model)
      return
    }
    for (const call of job.calls) await answer(model, job.size, call)
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
