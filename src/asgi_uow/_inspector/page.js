// Lists units of work and draws one. What is shown is text, never parsed as HTML.

const SHAPES = {committed: "✓", "rolled back": "↺", unknown: "?", partial: "½"}
const LANES = {statement: "statements", commit: "COMMIT", rollback: "ROLLBACK", hook: "hooks"}

function element(tag, className, ...children) {
  const made = document.createElement(tag)
  made.className = className
  made.append(...children.filter(Boolean).flatMap(child => [" ", child]).slice(1))
  return made
}
const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`
const time = seconds => seconds >= 1 ? `${seconds.toFixed(2)} s`
  : `${(seconds * 1000).toFixed(seconds < .01 ? 2 : seconds < .1 ? 1 : 0)} ms`
const endOf = step => step.start + step.seconds
const titleOf = unit => unit.hook || (unit.path ? `${unit.method} ${unit.path}` : "block")
const shapeOf = unit => element("span",
  `uow-shape uow-${unit.outcome.replace(" ", "-")}`, SHAPES[unit.outcome] ?? "…")

export async function fetchUnits(after) {
  const response = await fetch(new URL(`units?after=${after}`, import.meta.url))
  if (!response.ok) throw new Error(`The inspector answered ${response.status}.`)
  return response.json()
}

// How often each statement was executed, where that asks for a look: N+1. Of some
// no more than a word is told, which several may have in common.
function repetitions(steps) {
  const counts = new Map()
  for (const {text} of steps.filter(({kind, text}) => kind === "statement" && / /.test(text)))
    counts.set(text, (counts.get(text) ?? 0) + 1)
  return new Map([...counts].filter(([, times]) => times >= 3))
}

// A connection is held up to the last step on it; between two steps it may be idle.
function connectionBars(steps, least) {
  const bars = [], held = new Map()
  for (const step of steps.filter(({kind}) => kind !== "hook")) {
    const database = step.database ? `, ${step.database}` : ""
    const lane = `${step.access} connection${database}`, hold = held.get(lane)
    const isNew = step.kind === "connection"
    if (isNew || (!hold && step.access === "write")) {
      const start = isNew ? endOf(step) : step.start, seconds = endOf(step) - start
      held.set(lane, {lane, kind: "held", text: "is held", start, seconds})
      if (isNew) bars.push({...step, lane, kind: "wait", text: "is waited for"})
      bars.push(held.get(lane))
    } else if (hold) {
      const start = endOf(hold), seconds = step.start - start
      if (step.access === "write" && seconds >= least)
        bars.push({lane, kind: "idle", start, seconds, text: `idle ${time(seconds)}`})
      hold.seconds = Math.max(hold.seconds, endOf(step) - hold.start)
    }
  }
  return bars
}

// They end innermost first; of a statement with no data its first word is told.
function savepointBars(steps) {
  const bars = [], open = []
  for (const step of steps.filter(({kind}) => kind === "statement")) {
    const [verb] = step.text.split(" ")
    if (verb === "SAVEPOINT") open.push(step.start)
    else if (open.length && (verb === "RELEASE" || verb === "ROLLBACK")) {
      const start = open.pop(), failed = verb === "ROLLBACK"
      const text = failed ? "rolled back" : "released", seconds = endOf(step) - start
      bars.push({lane: "savepoints", kind: "savepoint", text, start, seconds, failed})
    }
  }
  return bars
}

function pictureOf(unit, steps) {
  const [start, end] = unit.response ?? []
  const total = Math.max(...steps.map(endOf), end ?? 0, 1e-5)
  const percent = seconds => `${100 * seconds / total}%`
  const lanes = element("div", "uow-lanes"), tracks = new Map()
  const bars = [...connectionBars(steps, Math.max(total / 10, .005))]
  for (const [kind, lane] of Object.entries(LANES)) {
    for (const step of steps.filter(each => each.kind === kind)) {
      const look = kind === "statement" ? step.access : kind
      bars.push({...step, lane, kind: look, text: step.text || lane})
    }
    if (kind === "statement") bars.push(...savepointBars(steps))
  }
  if (unit.response) bars.push({lane: "response", kind: "response", start,
    seconds: end - start, text: `${unit.status}`})
  for (const {lane, kind, failed, text, start, seconds} of bars) {
    if (!tracks.has(lane)) {
      tracks.set(lane, element("div", "uow-track"))
      lanes.append(element("span", "", lane), tracks.get(lane))
    }
    const fits = seconds / total > .2 && /idle|response/.test(kind)
    const bar = element("div", `uow-bar uow-${kind}`, fits && element("span", "", text))
    if (failed) bar.classList.add("uow-failed")
    bar.title = `${text}: ${time(seconds)}`
    Object.assign(bar.style, {left: percent(start), width: percent(seconds)})
    tracks.get(lane).append(bar)
  }
  const axis = element("div", "uow-axis"), power = 10 ** Math.floor(Math.log10(total / 2))
  const tick = [5, 2, 1].map(factor => factor * power).find(each => each <= total / 2)
  const marks = unit.response ? [[element("i", ""), start]] : []
  for (let at = 0; at < total * .9; at += tick)
    marks.push([element("span", "", time(at).replace(/\.0+ /, " ")), at])
  for (const [mark, at] of marks) mark.style.left = percent(at)
  axis.append(...marks.map(([mark]) => mark))
  lanes.append(element("span", ""), axis)
  lanes.setAttribute("role", "img")
  lanes.setAttribute("aria-label", "Timeline of the steps in the table")
  return lanes
}

function tableOf(unit, steps) {
  const often = repetitions(steps), [start, end] = unit.response ?? []
  const rows = steps.map(step => step.kind !== "connection" ? step
    : step.access === "write" ? {...step, start: endOf(step), text: "BEGIN", waited: true}
      : {...step, text: "Connection", waited: true})
  if (unit.response) rows.push({kind: "response", start, seconds: end - start,
    text: `The response leaves: ${unit.status}`})
  const body = element("tbody", "")
  for (const row of rows.sort((a, b) => a.start - b.start)) {
    const isSQL = row.kind === "statement", times = isSQL && often.get(row.text)
    const about = [row.waited && "a connection was waited for", row.database]
    const marks = [times && `executed ${times} times`, row.failed && "failed"]
    body.append(element("tr", `uow-${row.kind} uow-${row.access}`,
      element("td", "", time(row.start)),
      element("td", "", element(isSQL ? "code" : "strong", "", row.text || LANES[row.kind]),
        ...about.filter(Boolean).map(each => element("small", "", each)),
        ...marks.filter(Boolean).map(each => element("small", "uow-mark", each))),
      element("td", "", time(row.seconds), isSQL && element("small", "", row.access))))
  }
  const head = ["after", "step", "took"].map(each => element("th", "", each))
  return element("table", "uow-steps",
    element("thead", "", element("tr", "", ...head)), body)
}

export function draw(unit) {
  const steps = unit.steps.toSorted((a, b) => a.start - b.start)
  const facts = unit.statements ? [
    `${count(unit.statements.count, "statement")} in ${time(unit.statements.seconds)}`,
    unit.held && `connections waited for ${time(unit.waited)}, held ${time(unit.held)}, `
      + `idle ${time(unit.idle)} of that`,
    unit.attempt > 1 && `attempt ${unit.attempt}`,
    unit.replayed && "its idempotency key was used before",
    unit.hook_of && `a hook of unit ${unit.hook_of}`,
    unit.closed && unit.path && !unit.response && "answered outside of the middleware"] : []
  const notes = [...unit.notes, ...[...repetitions(steps)].map(([text, times]) =>
    `One statement was executed ${times} times: ${text}`)]
  return element("article", "uow-unit",
    element("h2", "", titleOf(unit), unit.status && ` → ${unit.status}`),
    element("p", "uow-sentence", shapeOf(unit), unit.sentence),
    element("p", "uow-facts", facts.filter(Boolean).join(" · ")),
    ...notes.map(note => element("p", "uow-note", note)),
    ...unit.closed ? [pictureOf(unit, steps), tableOf(unit, steps)]
      : [element("p", "uow-facts", "Its timeline comes when it is over.")])
}

// What follows is the page of the inspector; another that imports this has no such list.
const list = document.getElementById("uow-list"), known = new Map()
const chosen = document.getElementById("uow-chosen")
const following = document.getElementById("uow-follow")
let shown = 0

function show(number) {
  shown = number
  for (const [each, {button}] of known) {
    button.tabIndex = each === number ? 0 : -1
    button.setAttribute("aria-current", String(each === number))
  }
  chosen.replaceChildren(draw(known.get(number).unit))
}

function take(unit) {
  const {button} = known.get(unit.number) ?? {button: element("button", "")}
  if (!button.onclick) list.prepend(element("li", "", button))
  button.onclick = () => {
    following.checked = false
    show(unit.number)
    if (chosen.offsetTop > list.offsetTop) chosen.scrollIntoView()
  }
  known.set(unit.number, {unit, button})
  const most = Math.max(0, ...repetitions(unit.steps).values())
  const about = [unit.outcome, unit.statements && count(unit.statements.count, "statement"),
    unit.seconds && time(unit.seconds), unit.attempt > 1 && `attempt ${unit.attempt}`]
  button.replaceChildren(shapeOf(unit), element("b", "", titleOf(unit)),
    element("span", "", unit.status && `${unit.status}`),
    element("small", "", about.filter(Boolean).join(" · "),
      most && element("span", "uow-mark", `×${most}`),
      unit.notes.length && element("span", "uow-mark", "!")))
}

async function update(after) {
  const {revision, units} = await fetchUnits(after)
  if (revision < after) { // the application was started again
    known.clear()
    list.replaceChildren()
    return update(0)
  }
  units.forEach(take)
  for (const [number, {button}] of [...known].slice(0, -200)) {
    known.delete(number)
    button.parentNode.remove()
  }
  const stays = known.has(shown) && !following.checked
  const next = stays ? shown : Math.max(0, ...known.keys())
  if (next !== shown || units.some(({number}) => number === shown)) show(next)
  return revision
}

async function follow() {
  const state = document.getElementById("uow-state")
  for (let after = 0, said; ;) {
    try {
      after = await update(after)
      said = known.size ? count(known.size, "unit") : "None yet: send a request."
    } catch (error) {
      said = `Not up to date. ${error.message}`
    }
    if (state.textContent !== said) state.textContent = said
    await new Promise(resolve => setTimeout(resolve, 1000))
    if (document.hidden)
      await new Promise(seen => addEventListener("visibilitychange", seen, {once: true}))
  }
}

if (list) {
  list.onkeydown = event => {
    const side = {ArrowDown: "nextSibling", ArrowUp: "previousSibling"}[event.key]
    const next = side && event.target.closest("li")?.[side]?.firstChild
    if (!next) return
    event.preventDefault()
    next.focus()
    next.click()
  }
  follow()
}
