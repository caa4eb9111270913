import Foundation
import Observation

/// A conversation as a view shows it. Knows nothing of SwiftUI, nor of Python.
@MainActor
@Observable
public final class ChatModel {
    public struct Turn: Identifiable, Sendable {
        public let id = UUID()
        public let fromUser: Bool
        public internal(set) var text: String
        public let pictures: [Data]
    }

    public enum State: Equatable, Sendable {
        case empty, loading, ready, answering
        case failed(String)
    }

    public private(set) var turns: [Turn] = []
    public private(set) var state = State.empty
    /// What is being read before the answer begins, from 0 to 1; nil when nothing is.
    public private(set) var reading: Double?
    public var options = Gemma3Options()

    private var engine: Gemma3Engine?
    private var session: Gemma3Session?
    private var answering: Task<Void, Never>?

    public init() {}

    /// Load a model and begin a conversation.
    public func load(_ model: String, system: String? = nil) async {
        await close()
        state = .loading
        do {
            let engine = try await Gemma3Engine(model)
            self.engine = engine
            session = try await engine.session(system: system)
            state = .ready
        } catch {
            state = .failed(error.localizedDescription)
        }
    }

    /// Say something; the answer grows in the last of `turns`.
    public func send(_ text: String, pictures: [Data] = []) {
        guard state == .ready, let session else { return }
        turns.append(Turn(fromUser: true, text: text, pictures: pictures))
        turns.append(Turn(fromUser: false, text: "", pictures: []))
        state = .answering
        let answer = session.send(text, pictures: pictures, options: options)
        answering = Task { await follow(answer) }
    }

    /// End the answer; what has come of it stays.
    public func stop() { answering?.cancel() }

    /// Free the model. To be awaited before the application quits.
    public func close() async {
        stop()
        await answering?.value
        try? await engine?.close()
        engine = nil
        session = nil
        answering = nil
        turns = []
        state = .empty
    }

    private func follow(_ answer: Gemma3Answer) async {
        let last = turns.count - 1
        do {
            for try await event in answer {
                switch event {
                case .progress(_, let done, let total):
                    reading = total > 0 ? Double(done) / Double(total) : 0
                case .text(let text):
                    reading = nil
                    turns[last].text += text
                case .done:
                    break
                }
            }
            state = .ready
        } catch {
            turns.removeSubrange((last - 1)...)  // a turn that failed was not said
            state = .failed(error.localizedDescription)
        }
        reading = nil
    }
}
