// Lists units of work and draws one. What is shown is text, never parsed as HTML.

const SHAPES = {committed: "✓", "rolled back": "↺", unknown: "?", partial: "½"}
const LANES = {statement: "statements", savepoint: "savepoints", commit: "COMMIT",
  rollback: "ROLLBACK", hook: "hooks", response: "response"}

function element(tag, className, ...children) {
  const made = document.createElement(tag)
  made.className = className
  made.append(...children.filter(Boolean).flatMap(child => [" ", child]).slice(1))
  return made
}
const smalls = (look, texts) => texts.filter(Boolean).map(text => element("small", look, text))
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
  for (const {kind, text} of steps)
    if (kind === "statement" && / /.test(text)) counts.set(text, (counts.get(text) ?? 0) + 1)
  return new Map([...counts].filter(([, times]) => times >= 3))
}

// A connection is held up to the last step on it; between two steps it may be idle.
function connectionBars(steps, least) {
  const bars = [], held = new Map()
  for (const step of steps.filter(({access}) => access)) {
    const lane = `${step.access} connection${step.database ? `, ${step.database}` : ""}`
    const hold = held.get(lane), isNew = step.kind === "connection"
    if (isNew) bars.push({...step, lane, kind: "wait", text: "is waited for"})
    if (isNew || (!hold && step.access === "write")) {
      const start = isNew ? endOf(step) : step.start, seconds = endOf(step) - start
      held.set(lane, {lane, kind: "held", text: "is held", start, seconds})
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

// Savepoints end innermost first; of their statements the first word is told.
function savepointBars(steps) {
  const bars = [], open = []
  for (const step of steps.filter(({kind}) => kind === "statement")) {
    const [verb] = step.text.split(" "), failed = verb === "ROLLBACK"
    if (verb === "SAVEPOINT") open.push(step.start)
    else if (open.length && (failed || verb === "RELEASE")) {
      const start = open.pop(), seconds = endOf(step) - start
      const text = failed ? "is rolled back" : "is released"
      bars.push({kind: "savepoint", text, start, seconds, failed})
    }
  }
  return bars
}

function pictureOf(steps) {
  const total = Math.max(...steps.map(endOf), 1e-5)
  const percent = seconds => `${100 * seconds / total}%`
  const lanes = element("div", "uow-lanes"), tracks = {}, axis = element("div", "uow-axis")
  const all = [...steps, ...savepointBars(steps)], marks = []
  const bars = connectionBars(steps, Math.max(total / 10, .005))
  for (const [kind, lane] of Object.entries(LANES))
    bars.push(...all.filter(each => each.kind === kind).map(each => ({...each, lane})))
  for (const {lane, kind, access, failed, text, start, seconds} of bars) {
    if (!tracks[lane])
      lanes.append(element("span", "", lane), tracks[lane] = element("div", "uow-track"))
    const label = seconds > total / 5 && /idle|response/.test(kind) && element("span", "", text)
    const bar = element("div", `uow-bar uow-${kind} uow-is-${access}`, label)
    if (failed) bar.classList.add("uow-failed")
    bar.title = `${text || lane}: ${time(seconds)}`
    Object.assign(bar.style, {left: percent(start), width: percent(seconds)})
    tracks[lane].append(bar)
    if (kind === "response") marks.push([element("i", ""), start])
  }
  const power = 10 ** Math.floor(Math.log10(total / 2))
  const tick = [5, 2, 1].map(factor => factor * power).find(each => each <= total / 2)
  for (let at = 0; at < total * .8; at += tick)
    marks.push([element("span", "", time(at).replace(/\.0+ /, " ")), at])
  for (const [mark, at] of marks) {
    mark.style.left = percent(at)
    axis.append(mark)
  }
  lanes.append(element("span", ""), axis)
  lanes.setAttribute("role", "img")
  lanes.setAttribute("aria-label", "Timeline of the steps in the table")
  return lanes
}

function tableOf(steps) {
  const often = repetitions(steps), texts = {connection: "Connection", ...LANES}
  const rows = steps.map(step => step.kind === "connection" && step.access === "write"
    ? {...step, start: endOf(step), text: "BEGIN"} : step)
  const body = element("tbody", "")
  for (const {kind, access, text, start, seconds, failed, database}
    of rows.sort((a, b) => a.start - b.start)) {
    const isSQL = kind === "statement", times = isSQL && often.get(text)
    const said = kind === "response" ? `The response leaves: ${text}` : text || texts[kind]
    body.append(element("tr", `uow-${kind} uow-is-${access}`,
      element("td", "", time(start)),
      element("td", "", element(isSQL ? "code" : "strong", "", said),
        ...smalls("", [kind === "connection" && "a connection was waited for", database]),
        ...smalls("uow-mark", [times && `executed ${times} times`, failed && "failed"])),
      element("td", "", time(seconds), ...smalls("", [isSQL && access]))))
  }
  const head = ["after", "step", "took"].map(each => element("th", "", each))
  return element("table", "uow-steps", element("thead", "", element("tr", "", ...head)), body)
}

export function draw(unit) {
  const [start, end] = unit.response ?? []
  const response = {kind: "response", text: `${unit.status}`, start, seconds: end - start}
  const steps = [...unit.steps, ...unit.response ? [response] : []]
    .sort((a, b) => a.start - b.start)
  const facts = [
    unit.statements && `${count(unit.statements.count, "statement")} in `
      + time(unit.statements.seconds),
    unit.held && `connections waited for ${time(unit.waited)}, held ${time(unit.held)}, `
      + `idle ${time(unit.idle)} of that`,
    unit.attempt > 1 && `attempt ${unit.attempt}`,
    unit.replayed && "its idempotency key was used before",
    unit.hook_of && `a hook of unit ${unit.hook_of}`,
    unit.closed && unit.path && !unit.response && "answered outside of the middleware",
    !unit.closed && "its timeline comes when it is over"]
  const notes = [...unit.notes, ...[...repetitions(steps)].map(([text, times]) =>
    `One statement was executed ${times} times: ${text}`)]
  return element("article", "uow-unit",
    element("h2", "", titleOf(unit), unit.status && `→ ${unit.status}`),
    element("p", "uow-sentence", shapeOf(unit), unit.sentence),
    element("p", "uow-facts", facts.filter(Boolean).join(" · ")),
    ...notes.map(note => element("p", "uow-note", note)),
    ...unit.closed ? [pictureOf(steps), tableOf(steps)] : [])
}

// What follows is the page of the inspector; another that imports this has no such list.
const byId = id => document.getElementById(`uow-${id}`)
const list = byId("list"), chosen = byId("chosen"), following = byId("follow")
const buttons = new Map() // by the number of the unit, the oldest first
let shown = 0

function show(number) {
  shown = number
  for (const [each, button] of buttons) {
    button.tabIndex = each === number ? 0 : -1
    button.setAttribute("aria-current", each === number)
  }
  chosen.replaceChildren(draw(buttons.get(number).unit))
}

function take(unit) {
  const button = buttons.get(unit.number) ?? element("button", "")
  if (!button.unit) list.prepend(element("li", "", button))
  button.unit = unit
  button.onclick = () => {
    following.checked = false
    show(unit.number)
    if (chosen.offsetTop > list.offsetTop) chosen.scrollIntoView()
  }
  buttons.set(unit.number, button)
  const most = Math.max(0, ...repetitions(unit.steps).values())
  const about = [unit.outcome, unit.statements && count(unit.statements.count, "statement"),
    unit.seconds && time(unit.seconds), unit.attempt > 1 && `attempt ${unit.attempt}`]
  button.replaceChildren(shapeOf(unit), element("b", "", titleOf(unit)),
    element("span", "", unit.status && `${unit.status}`),
    element("small", "", about.filter(Boolean).join(" · "),
      ...smalls("uow-mark", [most && `×${most}`, unit.notes.length && "!"])))
}

async function update(after) {
  const {revision, units} = await fetchUnits(after), isOther = revision < after
  units.forEach(take)
  // What is too old goes; everything does if the application was started again.
  for (const [number, button] of [...buttons].slice(0, isOther ? undefined : -200)) {
    buttons.delete(number)
    button.parentNode.remove()
  }
  if (isOther) return update(0)
  const stays = buttons.has(shown) && !following.checked
  const next = stays ? shown : Math.max(0, ...buttons.keys())
  if (!next) chosen.replaceChildren()
  else if (next !== shown || units.some(({number}) => number === shown)) show(next)
  return revision
}

async function follow() {
  for (let after = 0, said; ;) {
    try {
      after = await update(after)
      said = buttons.size ? count(buttons.size, "unit") : "None yet: send a request."
    } catch (error) {
      said = `Not up to date. ${error.message}`
    }
    if (byId("state").textContent !== said) byId("state").textContent = said
    await new Promise(resolve => setTimeout(resolve, 1000))
    if (document.hidden)
      await new Promise(seen => addEventListener("visibilitychange", seen, {once: true}))
  }
}

if (list) {
  list.onkeydown = event => {
    const side = {ArrowDown: "nextSibling", ArrowUp: "previousSibling"}[event.key]
    const next = side && event.target.closest("li")?.[side]?.firstChild
    next?.focus()
    next?.click()
    if (side) event.preventDefault()
  }
  follow()
}
