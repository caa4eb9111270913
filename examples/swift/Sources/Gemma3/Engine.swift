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
    var arguments: [(key: String, value: PythonConvertible)] {
        var found: [(key: String, value: PythonConvertible)] = [
            ("max_tokens", maxTokens), ("stop", stop), ("pan_and_scan", panAndScan),
        ]
        if let temperature { found.append(("temperature", temperature)) }
        if let topK { found.append(("top_k", topK)) }
        if let topP { found.append(("top_p", topP)) }
        if let seed { found.append(("seed", seed)) }
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
            let module = try Python.attemptImport("mlx_gemma3")
            let arguments: [(key: String, value: PythonConvertible)] = [
                ("", model), ("text_only", textOnly), ("quiet", true), ("wait", false),
            ]
            return PythonBox(try module.load.throwing.dynamicallyCall(withKeywordArguments: arguments))
        }
        let loading = engine
        do {
            while try await !PythonThread.shared.run({
                let wait = loading.object.wait_until_loaded.throwing
                return Bool(try wait.dynamicallyCall(withArguments: pollSeconds)) ?? false
            }) {
                try Task.checkCancellation()
            }
        } catch {
            try? await close()
            throw error
        }
    }

    /// Answer a prompt. Pictures are the bytes of picture files and stand before the words.
    public func answer(_ prompt: String, pictures: [Data] = [], options: Gemma3Options = .init()) -> Gemma3Answer {
        stream(of: engine, "stream", prompt, pictures, options)
    }

    /// A conversation that keeps what it has read; `resume` is a file from `Gemma3Session.save`.
    public func session(system: String? = nil, resume: URL? = nil) async throws -> Gemma3Session {
        let engine = self.engine
        return Gemma3Session(try await PythonThread.shared.run {
            let arguments: [(key: String, value: PythonConvertible)] = [("system", system), ("resume", resume?.path)]
            return PythonBox(try engine.object.session.throwing.dynamicallyCall(withKeywordArguments: arguments))
        })
    }

    /// Cancel what is in work and free the model.
    public func close() async throws {
        let engine = self.engine
        try await PythonThread.shared.run { _ = try engine.object.close.throwing.dynamicallyCall(withArguments: []) }
    }
}

/// A conversation. Turns are answered in the order in which they were sent.
public final class Gemma3Session: Sendable {
    private let session: PythonBox

    init(_ session: PythonBox) { self.session = session }

    public func send(_ words: String, pictures: [Data] = [], options: Gemma3Options = .init()) -> Gemma3Answer {
        stream(of: session, "send", words, pictures, options)
    }

    /// Forget the last turn and its answer.
    public func undo() async throws {
        let session = self.session
        try await PythonThread.shared.run { _ = try session.object.undo.throwing.dynamicallyCall(withArguments: []) }
    }

    public func save(to file: URL) async throws {
        let session = self.session
        try await PythonThread.shared.run {
            _ = try session.object.save.throwing.dynamicallyCall(withArguments: file.path)
        }
    }
}

/// How long a poll waits. Only while it does can the engine's thread run; a cancel takes effect after it.
private let pollSeconds = 0.05

/// Poll a Python stream until it ends. Cancelling the task that reads cancels the answer.
private func stream(
    of owner: PythonBox, _ method: String, _ words: String, _ pictures: [Data], _ options: Gemma3Options
) -> Gemma3Answer {
    Gemma3Answer { continuation in
        let task = Task {
            do {
                let stream = try await PythonThread.shared.run {
                    var arguments = options.arguments
                    arguments.append(("", words))
                    arguments.append(("images", pictures.map { PythonBytes($0) }))
                    let start = owner.object[dynamicMember: method].throwing
                    return PythonBox(try start.dynamicallyCall(withKeywordArguments: arguments))
                }
                var ended = false
                while !ended {
                    let stop = Task.isCancelled
                    let event = try await PythonThread.shared.run {
                        if stop { _ = try stream.object.cancel.throwing.dynamicallyCall(withArguments: []) }
                        return try poll(stream.object)
                    }
                    if let event { continuation.yield(event) }
                    if case .done = event { ended = true }
                }
                continuation.finish()
            } catch {
                continuation.finish(throwing: error)
            }
        }
        continuation.onTermination = { _ in task.cancel() }
    }
}

/// The next event of a Python stream, nil when there was none. In the Python thread only.
private func poll(_ stream: PythonObject) throws -> Gemma3Event? {
    let event = try stream.next.throwing.dynamicallyCall(withArguments: pollSeconds)
    func text(_ name: String) -> String { event.checking[name].flatMap { String($0) } ?? "" }
    func count(_ name: String, of usage: PythonObject) -> Int { usage.checking[name].flatMap { Int($0) } ?? 0 }
    switch text("kind") {
    case "text":
        return .text(text("text"))
    case "done":
        let usage = event["usage"]
        return .done(
            text: text("text"), finishReason: text("finish_reason"),
            promptTokens: count("prompt_tokens", of: usage),
            completionTokens: count("completion_tokens", of: usage))
    case "error":
        throw Gemma3Error(code: text("code"), message: text("message"))
    default:
        let stage = text("stage")
        return stage.isEmpty
            ? nil : .progress(stage: stage, done: count("done", of: event), total: count("total", of: event))
    }
}
