import Foundation
import PythonKit

/// How an answer is made; what is nil is left to the checkpoint.
public struct Gemma3Options: Sendable {
    public var maxTokens = 1024
    public var temperature: Double?
    public var topK: Int?
    public var topP: Double?
    public var minP: Double?
    public var repetitionPenalty: Double?
    public var presencePenalty: Double?
    public var frequencyPenalty: Double?
    public var logitBias: [Int: Double] = [:]  // token id to what is added to its logit, -100 to 100
    public var seed: Int?
    public var stop: [String] = []
    public var panAndScan = false

    public init() {}

    /// In the Python thread only.
    var arguments: [Argument] {
        var found: [Argument] = [
            (key: "max_tokens", value: maxTokens),
            (key: "stop", value: stop),
            (key: "pan_and_scan", value: panAndScan),
            (key: "logit_bias", value: logitBias),
        ]
        let numbers: [(String, PythonConvertible?)] = [
            ("temperature", temperature), ("top_k", topK), ("top_p", topP), ("min_p", minP),
            ("repetition_penalty", repetitionPenalty), ("presence_penalty", presencePenalty),
            ("frequency_penalty", frequencyPenalty), ("seed", seed),
        ]
        for case (let key, let value?) in numbers { found.append((key: key, value: value)) }
        return found
    }
}

/// What comes of an answer, in this order: progress, text, and at the end one `done`.
public enum Gemma3Event: Sendable {
    case progress(stage: String, done: Int, total: Int)
    case text(String)
    case done(text: String, finishReason: String, promptTokens: Int, completionTokens: Int)
}

public typealias Gemma3Answer = AsyncThrowingStream<Gemma3Event, Error>

/// A loaded model. Close it before the application quits.
public final class Gemma3Engine: Sendable {
    private let engine: PythonBox

    /// Load a model: alias, folder, `owner/name` on the Hub, or .gguf file.
    public init(_ model: String, textOnly: Bool = false) async throws {
        engine = PythonBox {
            try startPython()
            let arguments: [Argument] = [
                (key: "", value: model),
                (key: "text_only", value: textOnly),
                (key: "quiet", value: true),
                (key: "wait", value: false),
            ]
            return try call(Python.attemptImport("mlx_gemma3"), "load", arguments)
        }
        let loading = engine
        do {
            var ready = false
            while !ready {
                try Task.checkCancellation()
                ready = try await PythonThread.shared.run {
                    let found = try call(loading.object(), "wait_until_loaded", [(key: "", value: pollSeconds)])
                    return Bool(found) ?? false
                }
            }
        } catch {
            try? await close()  // of a load that did not begin there is nothing to close
            throw error
        }
    }

    /// Answer a prompt. Pictures are the bytes of picture files and stand before the words.
    public func answer(_ prompt: String, pictures: [Data] = [], options: Gemma3Options = .init()) -> Gemma3Answer {
        startAnswer(of: engine, "stream", prompt, pictures, options).answer
    }

    /// A conversation that keeps what it has read; `resume` is a file from `Gemma3Session.save`.
    public func session(system: String? = nil, resume: URL? = nil) async throws -> Gemma3Session {
        let engine = self.engine
        let session = PythonBox {
            let arguments: [Argument] = [(key: "system", value: system), (key: "resume", value: resume?.path)]
            return try call(engine.object(), "session", arguments)
        }
        try await PythonThread.shared.run { _ = try session.object() }
        return Gemma3Session(session)
    }

    /// Cancel what is in work and free the model.
    public func close() async throws {
        let engine = self.engine
        try await PythonThread.shared.run { _ = try call(engine.object(), "close") }
    }
}

/// A conversation. Turns are answered in the order in which they were sent.
public final class Gemma3Session: @unchecked Sendable {
    private let session: PythonBox
    private let lock = NSLock()
    private var lastTurn: Task<Void, Never>?  // under the lock; ends with the turn that was sent last

    init(_ session: PythonBox) { self.session = session }

    public func send(_ words: String, pictures: [Data] = [], options: Gemma3Options = .init()) -> Gemma3Answer {
        lock.withLock {
            let (answer, turn) = startAnswer(of: session, "send", words, pictures, options)
            lastTurn = turn
            return answer
        }
    }

    /// Forget the last turn and its answer.
    public func undo() async throws { try await afterTurns("undo") }

    public func save(to file: URL) async throws { try await afterTurns("save", [file.path]) }

    /// Python too would wait for the turns in work, and hold up the thread in which they are polled and cancelled.
    private func afterTurns(_ method: String, _ values: [String] = []) async throws {
        let session = self.session
        await lock.withLock { lastTurn }?.value
        try await PythonThread.shared.run {
            _ = try call(session.object(), method, values.map { (key: "", value: $0) })
        }
    }
}

/// How long a poll waits. Only while it does can the engine's thread run; a cancel takes effect after it.
private let pollSeconds = 0.05

/// How many answers share the Python thread; together they wait `pollSeconds`.
private let polled = Count()

private final class Count: @unchecked Sendable {
    private let lock = NSLock()
    private var count = 0

    var value: Int { lock.withLock { count } }

    func add(_ number: Int) { lock.withLock { count += number } }
}

/// Ask for an answer, and poll its Python stream until it ends. Cancelling the task that reads cancels the answer.
private func startAnswer(
    of owner: PythonBox, _ method: String, _ words: String, _ pictures: [Data], _ options: Gemma3Options
) -> (answer: Gemma3Answer, polling: Task<Void, Never>) {
    let stream = PythonBox {
        var arguments = options.arguments
        arguments.append((key: "", value: words))
        arguments.append((key: "images", value: pictures.map { PythonBytes($0) }))
        return try call(owner.object(), method, arguments)
    }
    let (answer, continuation) = Gemma3Answer.makeStream()
    polled.add(1)
    let polling = Task {
        defer { polled.add(-1) }
        do {
            var ended = false
            while !ended {
                let stop = Task.isCancelled
                let events = try await PythonThread.shared.run {
                    if stop { try call(stream.object(), "cancel") }
                    return try nextEvents(of: stream.object())
                }
                for event in events {
                    continuation.yield(event)
                    if case .done = event { ended = true }
                }
            }
            continuation.finish()
        } catch {
            continuation.finish(throwing: error)
        }
    }
    continuation.onTermination = { _ in polling.cancel() }
    return (answer, polling)
}

/// The events of a Python stream that come in time. In the Python thread only.
private func nextEvents(of stream: PythonObject) throws -> [Gemma3Event] {
    var events: [Gemma3Event] = []
    let wait = pollSeconds / Double(max(polled.value, 1))
    do {
        while let event = try nextEvent(of: stream, within: events.isEmpty ? wait : 0) {
            events.append(event)
            if case .done = event { break }
        }
    } catch {
        if events.isEmpty { throw error }  // else it is given again at the next call
    }
    return events
}

/// The next event, nil when none came in time.
private func nextEvent(of stream: PythonObject, within seconds: Double) throws -> Gemma3Event? {
    let event = try call(stream, "next", [(key: "", value: seconds)])
    func text(_ name: String) -> String { event.checking[name].flatMap { String($0) } ?? "" }
    func count(_ name: String, in found: PythonObject?) -> Int { found?.checking[name].flatMap { Int($0) } ?? 0 }
    switch text("kind") {
    case "text":
        return .text(text("text"))
    case "done":
        let usage = event.checking["usage"]
        return .done(
            text: text("text"), finishReason: text("finish_reason"),
            promptTokens: count("prompt_tokens", in: usage),
            completionTokens: count("completion_tokens", in: usage))
    case "error":
        throw Gemma3Error(code: text("code"), message: text("message"))
    default:
        let stage = text("stage")
        if stage.isEmpty { return nil }
        return .progress(stage: stage, done: count("done", in: event), total: count("total", in: event))
    }
}
