import Foundation
import PythonKit

/// How an answer is made; what is nil is left to the checkpoint.
public struct Gemma3Options: Sendable {
    public var maxTokens = 1024
    public var temperature: Double?
    public var topK: Int?
    public var topP: Double?
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
        ]
        if let temperature { found.append((key: "temperature", value: temperature)) }
        if let topK { found.append((key: "top_k", value: topK)) }
        if let topP { found.append((key: "top_p", value: topP)) }
        if let seed { found.append((key: "seed", value: seed)) }
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
        engine = try await PythonThread.shared.run {
            let arguments: [Argument] = [
                (key: "", value: model),
                (key: "text_only", value: textOnly),
                (key: "quiet", value: true),
                (key: "wait", value: false),
            ]
            return PythonBox(try call(Python.attemptImport("mlx_gemma3"), "load", arguments))
        }
        let loading = engine
        do {
            var ready = false
            while !ready {
                try Task.checkCancellation()
                ready = try await PythonThread.shared.run {
                    let found = try call(loading.object, "wait_until_loaded", [(key: "", value: pollSeconds)])
                    return Bool(found) ?? false
                }
            }
        } catch {
            try? await close()
            throw error
        }
    }

    /// Answer a prompt. Pictures are the bytes of picture files and stand before the words.
    public func answer(_ prompt: String, pictures: [Data] = [], options: Gemma3Options = .init()) -> Gemma3Answer {
        startAnswer(of: engine, "stream", prompt, pictures, options)
    }

    /// A conversation that keeps what it has read; `resume` is a file from `Gemma3Session.save`.
    public func session(system: String? = nil, resume: URL? = nil) async throws -> Gemma3Session {
        let engine = self.engine
        let session = try await PythonThread.shared.run {
            let arguments: [Argument] = [(key: "system", value: system), (key: "resume", value: resume?.path)]
            return PythonBox(try call(engine.object, "session", arguments))
        }
        return Gemma3Session(session)
    }

    /// Cancel what is in work and free the model.
    public func close() async throws {
        let engine = self.engine
        try await PythonThread.shared.run { _ = try call(engine.object, "close") }
    }
}

/// A conversation. Turns are answered in the order in which they were sent.
public final class Gemma3Session: Sendable {
    private let session: PythonBox

    init(_ session: PythonBox) { self.session = session }

    public func send(_ words: String, pictures: [Data] = [], options: Gemma3Options = .init()) -> Gemma3Answer {
        startAnswer(of: session, "send", words, pictures, options)
    }

    /// Forget the last turn and its answer.
    public func undo() async throws {
        let session = self.session
        try await PythonThread.shared.run { _ = try call(session.object, "undo") }
    }

    public func save(to file: URL) async throws {
        let session = self.session
        try await PythonThread.shared.run { _ = try call(session.object, "save", [(key: "", value: file.path)]) }
    }
}

/// How long a poll waits. Only while it does can the engine's thread run; a cancel takes effect after it.
private let pollSeconds = 0.05

/// Poll a Python stream until it ends. Cancelling the task that reads cancels the answer.
private func startAnswer(
    of owner: PythonBox, _ method: String, _ words: String, _ pictures: [Data], _ options: Gemma3Options
) -> Gemma3Answer {
    Gemma3Answer { continuation in
        let task = Task {
            do {
                let answer = try await PythonThread.shared.run {
                    var arguments = options.arguments
                    arguments.append((key: "", value: words))
                    arguments.append((key: "images", value: pictures.map { PythonBytes($0) }))
                    return PythonBox(try call(owner.object, method, arguments))
                }
                var ended = false
                while !ended {
                    let stop = Task.isCancelled
                    let events = try await PythonThread.shared.run {
                        if stop { try call(answer.object, "cancel") }
                        return try nextEvents(of: answer.object)
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
        continuation.onTermination = { _ in task.cancel() }
    }
}

/// The events of a Python stream that come in time: several streams may share the thread. In the Python thread only.
private func nextEvents(of stream: PythonObject) throws -> [Gemma3Event] {
    var events: [Gemma3Event] = []
    do {
        while let event = try nextEvent(of: stream, within: events.isEmpty ? pollSeconds : 0) {
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
